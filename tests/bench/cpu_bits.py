"""8-bit activations and weights against 4-bit ones on this processor: linear layers, then whole answers, in turns.

    python tests/bench/cpu_bits.py [--shape C] [--recipes w4a4kv4 w4a8kv4 w8a8] [--rounds 5]

One thread. Layers are `linear_int`, as the operator runs here and in C for each instruction set. Answers are those of
random models (cpu_shapes.py) in float32 and bfloat16, compiled as in cpu_original.py. Every number is a median of CPU
time over rounds in which all candidates take turns. Prints Markdown tables.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu_models import build, model_inputs
from cpu_original import DTYPES, answer, quick
from cpu_processor import processor
from cpu_shapes import SHAPES, Shape

import qpcompile
from qpcompile.kernels.linear_int import cpu
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_dynamic.reference import code_range

# Of activations and weights.
BITS = ((4, 4), (8, 4), (8, 8))
LAYER = (2048, 2048)
TOKENS = (1, 16, 640)
# At least so long is a layer called for one measurement.
SECONDS = 0.05


def codes(bits: int, *sizes: int) -> torch.Tensor:
    """Random codes of so many bits, the highest among them."""
    lowest, highest = code_range(bits)
    made = torch.randint(lowest, highest + 1, sizes, dtype=torch.int8)
    made[0, 0] = highest
    return made


def calls(tokens: int, level: int | None) -> dict[tuple[int, int], Callable[[], Any]]:
    """A call of the layer for each of `BITS`: of the operator, or of C for an instruction set."""
    made: dict[tuple[int, int], Callable[[], Any]] = {}
    for bits, weight_bits in BITS:
        weight = stored_codes(codes(weight_bits, *LAYER), weight_bits)
        operands = codes(bits, tokens, LAYER[1]), torch.ones(tokens, 1), weight, torch.ones(LAYER[0], 1), None
        if level is None:
            made[bits, weight_bits] = lambda given=operands, bits=bits: cpu.linear_int(*given, torch.float32, bits)
        else:
            made[bits, weight_bits] = lambda given=operands: cpu._in_c(*given, torch.float32, level)
    return made


def milliseconds(call: Callable[[], Any]) -> float:
    """CPU time of one call, from as many as take `SECONDS`."""
    count, start = 0, time.process_time()
    while (passed := time.process_time() - start) < SECONDS:
        call()
        count += 1
    return 1000 * passed / count


def in_turns(made: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """The medians of candidates that are measured in turns; a first round is dropped."""
    found: dict[Any, list[float]] = {key: [] for key in made}
    for _ in range(rounds + 1):
        for key, measure in made.items():
            found[key].append(measure())
    return {key: statistics.median(times[1:]) for key, times in found.items()}


def layers(rounds: int) -> None:
    """The table of linear layers."""
    print(f"\n| linear_int, {LAYER[0]} x {LAYER[1]}, ms | tokens |" + "".join(f" W{w}A{a} |" for a, w in BITS))
    print("| --- | ---: |" + " ---: |" * len(BITS))
    for level in (None, *range(1, native.library().level + 1)):
        for tokens in TOKENS:
            timed = {bits: lambda call=call: milliseconds(call) for bits, call in calls(tokens, level).items()}
            cells = "".join(f" {ms:,.3f} |" for ms in in_turns(timed, rounds).values())
            name = "as it runs here" if level is None else f"in C, {native.LEVELS[level]}"
            print(f"| {name} | {tokens} |{cells}", flush=True)


def answers(shape: Shape, names: list[str], rounds: int) -> None:
    """The tables of whole answers."""
    for dtype in DTYPES:
        sample, models = model_inputs(shape, {"prompt": 1}, dtype), {}
        for name in names:
            models[name] = qpcompile.compile(build(shape).to(dtype), quick(name), calibration=[sample])
            models[name].generation_config.eos_token_id = None
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name, model in models.items():
                found[name].append(answer(model, sample))
        print(f"\n| {dtype}, ms |" + "".join(f" {name} |" for name in names))
        print("| --- |" + " ---: |" * len(names))
        for title, kind in (("first token", "first_core_ms"), ("later token", "decode_core_ms")):
            cells = [statistics.median(each[kind] for each in found[name][1:]) for name in names]
            print(f"| {title} |" + "".join(f" {ms:,.1f} |" for ms in cells), flush=True)


def main() -> None:
    """Print the tables, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="C", choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=["w4a4kv4", "w4a8kv4", "w8a8"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}; torch {torch.__version__}; shape {options.shape}, {options.rounds} rounds")
    layers(options.rounds)
    answers(SHAPES[options.shape], options.recipes, options.rounds)


if __name__ == "__main__":
    main()
