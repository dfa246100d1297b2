"""A compiled model against the model it came from, on this processor: no compiled model should be slower.

    python tests/bench/cpu_original.py [--shape C] [--recipes w4a4kv4] [--numerics fast exact] [--rounds 5]
    python tests/bench/cpu_original.py --shape testbed --every-instruction-set

Random weights of one shape (cpu_shapes.py), float32 and bfloat16, one thread. The recipe is compiled with a fixed
rotation and round-to-nearest on one sample: its speed is the same, its accuracy is not. Original and compiled models
answer in turns; milliseconds are medians of CPU time, which do not count other programs. Models in half precision have
fast numerics only. Prints a Markdown table. With `--every-instruction-set` a table for each one that this processor
has, in processes whose torch is restricted too.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from cpu import RESTRICTED, environment
from cpu_models import build, model_inputs
from cpu_processor import processor
from cpu_shapes import SHAPES, Shape
from cpu_worker import Clock

import qpcompile
from qpcompile.kernels.native import library as native

NEW_TOKENS = 17
DTYPES = (torch.float32, torch.bfloat16)
Times = list[dict[str, float]]


def quick(name: str, numerics: str = "fast") -> qpcompile.Recipe:
    """The preset without training and without what needs many samples."""
    recipe = qpcompile.Recipe.load(name).with_overrides([f"numerics={numerics}"])
    cheap = [] if recipe.quantize is None else ["quantize.transform=hadamard", "quantize.weights.solver=rtn"]
    return recipe.with_overrides(cheap)


def answer(model: Any, sample: dict[str, Any]) -> dict[str, float]:
    """The times of one answer."""
    clock = Clock()
    model.generate(**sample, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock)
    return clock.result()


def in_turns(models: Sequence[Any], sample: dict[str, Any], rounds: int) -> list[Times]:
    """Answers of all, one after the other; the first of each is dropped."""
    found: list[Times] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, times in zip(models, found, strict=True):
            times.append(answer(model, sample))
    return [times[1:] for times in found]


def rows(shape: Shape, name: str, dtype: torch.dtype, numerics: Sequence[str], rounds: int) -> list[str]:
    """The lines of one recipe and type."""
    sample = model_inputs(shape, {"prompt": 1}, dtype)
    models = [build(shape).to(dtype)]
    for each in numerics:
        compiled = qpcompile.compile(build(shape).to(dtype), quick(name, each), calibration=[sample])
        compiled.generation_config.eos_token_id = None
        models.append(compiled)
    before, *found = in_turns(models, sample, rounds)
    lines = []
    for each, after in zip(numerics, found, strict=True):
        cells = [name, str(dtype).removeprefix("torch."), each]
        for kind in ("first_core_ms", "decode_core_ms"):
            old, new = (statistics.median(each[kind] for each in times) for times in (before, after))
            cells += [f"{old:,.1f}", f"{new:,.1f}", f"{new / old:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(shape: Shape, recipes: Sequence[str], numerics: Sequence[str], rounds: int) -> None:
    """Print the table, row by row."""
    loaded = native.library()
    best = loaded.problem or ("amx" if loaded.amx else native.LEVELS[loaded.level])
    print(f"{processor()}; torch {torch.__version__}; shape {shape.name}, {rounds} rounds; operators in C: {best}\n")
    heads = (
        "| recipe | dtype | numerics | first token, original | compiled | ratio | token, original | compiled | ratio |"
    )
    print(f"{heads}\n| --- | --- | --- |{' ---: |' * 6}", flush=True)
    for name in recipes:
        for dtype in DTYPES:
            asked = numerics if dtype == torch.float32 else ["fast"]
            for line in rows(shape, name, dtype, asked, rounds):
                print(line, flush=True)


def main() -> int:
    """Print one table or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="C", choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=["w4a4kv4", "w4a16", "quota-30"])
    parser.add_argument("--numerics", nargs="+", default=["fast"], choices=["fast", "exact"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every-instruction-set", action="store_true", help="a table for each")
    parser.add_argument("--instruction-set", choices=RESTRICTED, help="the best that our operators in C use")
    options = parser.parse_args()
    if options.every_instruction_set:
        common = ["--shape", options.shape, "--recipes", *options.recipes, "--numerics", *options.numerics]
        common += ["--rounds", str(options.rounds)]
        return max(again(name, common) for name in [*native.LEVELS[: native.library().level], None])
    torch.set_num_threads(1)
    with native.instruction_set(options.instruction_set) if options.instruction_set else nullcontext():
        table(SHAPES[options.shape], options.recipes, options.numerics, options.rounds)
    return 0


def again(instruction_set: str | None, options: Sequence[str]) -> int:
    """This script in a process of its own, in which torch and oneDNN are restricted; its exit status."""
    chosen = ["--instruction-set", instruction_set] if instruction_set else []
    command = [sys.executable, __file__, *options, *chosen]
    status = subprocess.run(command, env=environment(1, instruction_set), check=False).returncode
    print(flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
