"""A compiled model under load: python tests/reliability/load.py

threads       answers of several threads on one compiled model equal those of a single thread
memory        resident memory grows by less than 10 KB per answer after warm-up
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import forks  # noqa: F401 (first import: it sets the path and the number of threads)
import numpy as np
import psutil
import torch
from programs import captured
from tally import Tally, begin, finish

import qpcompile
from qpcompile.recipe.recipe import Recipe

SLOPE = 10_000.0  # bytes per answer
NEW_TOKENS = 4
PROMPTS = ("one", "longer", "padded", "pictures")
SETTINGS = ("quantize.transform=hadamard", "quantize.weights.solver=rtn", "quantize.smooth=null")


def compiled() -> qpcompile.CompiledVLM:
    """A tiny random LLaVA in 4 bits that drops tokens."""
    model, cases, _ = captured()
    recipe = Recipe.load("quota-30").with_overrides([*SETTINGS, "quantize.center=null"])
    return qpcompile.compile(model, recipe, calibration=[cases["one"]])


def answer(model: qpcompile.CompiledVLM, name: str) -> list[list[int]]:
    """The tokens of one answer."""
    _, cases, _ = captured()
    return model.generate(**cases[name], max_new_tokens=NEW_TOKENS, do_sample=False).tolist()


def threads(model: qpcompile.CompiledVLM, workers: int, answers: int, seed: int) -> Tally:
    """Ask from several threads at once."""
    expected = {name: answer(model, name) for name in PROMPTS}
    tally = Tally(f"answers from {workers} threads")

    def ask(worker: int) -> list[str]:
        order = np.random.default_rng(seed + worker).choice(PROMPTS, answers)
        return ["same" if answer(model, name) == expected[name] else "changed" for name in order]

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(ask, range(workers)):
            for each in found:
                tally.add(each)
    return tally


def memory(model: qpcompile.CompiledVLM, answers: int, warm: int) -> Tally:
    """Ask and record resident memory."""
    process, sizes = psutil.Process(), []
    for number in range(warm + answers):
        answer(model, PROMPTS[number % len(PROMPTS)])
        sizes.append(process.memory_info().rss)
    slope = float(np.polyfit(np.arange(answers), np.array(sizes[warm:], dtype=np.float64), 1)[0])
    print(f"resident memory grows by {slope / 1000:.2f} KB an answer over {answers} answers")
    tally = Tally(f"slope of memory over {answers} answers: {slope / 1000:.2f} KB")
    tally.add("same" if slope < SLOPE else "changed")
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both checks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--each", type=int, default=200, help="answers of each thread")
    parser.add_argument("--answers", type=int, default=1000, help="answers that memory is watched over")
    parser.add_argument("--warm", type=int, default=200, help="answers before them")
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args(arguments)
    chance = begin(asked.seed)
    torch.set_num_threads(1)
    model = compiled()
    return finish(
        [
            threads(model, asked.threads, asked.each, chance.randrange(2**31)),
            memory(model, asked.answers, asked.warm),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
