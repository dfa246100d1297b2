"""A compiled model against the model it came from, on this processor: no compiled model should be slower.

    python tests/bench/cpu_original.py [--shape C] [--recipes w4a4kv4] [--numerics fast exact] [--rounds 5]

Random weights of one shape (cpu_shapes.py), float32 and bfloat16, one thread. The recipe is compiled with a fixed
rotation and round-to-nearest on one sample: its speed is the same, its accuracy is not. Original and compiled models
answer in turns; milliseconds are medians of CPU time, which do not count other programs. Models in half precision have
fast numerics only. Prints a Markdown table.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from cpu import processor
from cpu_models import build, model_inputs
from cpu_shapes import SHAPES, Shape
from cpu_worker import Clock

import qpcompile

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


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="C", choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=["w4a4kv4", "w4a16", "quota-30"])
    parser.add_argument("--numerics", nargs="+", default=["fast"], choices=["fast", "exact"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}; torch {torch.__version__}; shape {options.shape}, {options.rounds} rounds\n")
    print(
        "| recipe | dtype | numerics | first token, original | compiled | ratio | token, original | compiled | ratio |"
    )
    print(f"| --- | --- | --- |{' ---: |' * 6}", flush=True)
    for name in options.recipes:
        for dtype in DTYPES:
            asked = options.numerics if dtype == torch.float32 else ["fast"]
            for line in rows(SHAPES[options.shape], name, dtype, asked, options.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
