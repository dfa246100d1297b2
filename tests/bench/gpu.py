"""Time the linear layers of two models on this GPU: python tests/bench/gpu.py [--tokens 1 640] [--layers o]

Writes docs/results/kernels-<gpu>.csv and .md. Calls cycle through more weights than the cache holds, data is
random, calls are captured in CUDA graphs, and the kernels alternate in every round.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from gemm_layers import LAYERS, TOKENS, Layer
from gemm_peers import BASELINE, KERNELS, NotHereError, Prepared
from gemm_table import Ceiling, Row, as_csv, as_markdown
from gpu_timing import Call, interleaved
from torch import Tensor

from qpcompile.kernels.linear_int.tuning import slug, table_of

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = 2


def measure(layer: Layer, tokens: int) -> list[Row]:
    """All kernels on one layer, in turns; one that does not run gets a row with the reason."""
    prepared: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    for kernel, make in KERNELS.items():
        try:
            found = make(layer, tokens)
            found.calls[0]()
            torch.cuda.synchronize()
            prepared[kernel] = found
        except (NotHereError, RuntimeError, TypeError, NotImplementedError) as error:
            # An error may have no text.
            failed[kernel] = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    times = dict(zip(prepared, interleaved([each.calls for each in prepared.values()]), strict=True))
    rows = []
    for kernel in KERNELS:
        found = prepared.get(kernel)
        if found is None:
            rows.append(Row(layer, tokens, kernel, "", 0, None, failed[kernel]))
            continue
        width = 1 if found.kind in ("int8", "fp8") else 2
        moved = found.weight_bytes + tokens * (width * layer.in_features + 2 * layer.out_features)
        rows.append(Row(layer, tokens, kernel, found.kind, moved, times[kernel]))
    return rows


def ceiling(side: int = 8192, copied: int = 2**30) -> Ceiling:
    """The highest rates of torch's own products of `side` x `side` and of a copy of `copied` bytes on this GPU."""
    eight = torch.float8_e4m3fn
    codes = [torch.randint(-8, 8, (side, side), dtype=torch.int8, device="cuda") for _ in range(2)]
    floats = [torch.randn(side, side, device="cuda") for _ in range(2)]
    halves, small = [each.bfloat16() for each in floats], [each.to(eight) for each in floats]
    ones = torch.ones(side, 1, device="cuda")
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def fp8() -> Tensor:
        scales = {"scale_a": ones, "scale_b": ones.T, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch.ops.aten._scaled_mm.default(small[0], small[1].T, **scales)

    calls: dict[str, Call] = {
        "int8": lambda: torch.ops.aten._int_mm.default(codes[0], codes[1].T),
        "fp8": fp8,
        "bf16": lambda: halves[0] @ halves[1].T,
        "copy": lambda: target.copy_(source),
    }
    seconds = {name: each.median for name, each in zip(calls, interleaved([[x] for x in calls.values()]), strict=True)}
    operations = {name: 2 * side**3 / seconds[name] for name in ("int8", "fp8", "bf16")}
    return Ceiling(operations, 2 * copied / seconds["copy"])


def report(rows: Sequence[Row], limits: Ceiling) -> str:
    """The Markdown page: what ran, with which versions, the measured ceilings, and a table per layer."""
    gpu = torch.cuda.get_device_properties(0)
    table = table_of(gpu.name)
    tuned = f"measured with {table.tuned}" if table and table.tuned else "the rule's, not tuned on this device"
    packages = [f"{name} {version(name)}" for name in ("qpcompile", "torch", "triton")]
    reached = ", ".join(f"{kind} {rate / 1e12:.0f} TOPS" for kind, rate in limits.operations.items())
    missing = sorted({f"{row.kernel}: {row.note}" for row in rows if row.times is None})
    lines = [
        f"# Linear layers on {gpu.name}",
        "",
        "Written by `make bench-gpu` (tests/bench/gpu.py). Microseconds per call, median of interleaved rounds; in",
        f"brackets how many times faster than {BASELINE}. The CSV has the spread, rates and shares of the ceiling.",
        "",
        f"- {', '.join(packages)}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        f"- tiles of linear_int: {tuned}",
        f"- measured ceilings: {reached}, copy {limits.bandwidth / 1e9:.0f} GB/s",
        *[f"- did not run: {each}" for each in missing],
        "",
    ]
    return "\n".join(lines) + "\n" + as_markdown(rows, BASELINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--layers", nargs="+", choices=sorted({layer.name for layer in LAYERS}))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the kernel benchmark needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return NO_GPU
    torch.manual_seed(0)
    rows = []
    for layer in LAYERS:
        if options.layers and layer.name not in options.layers:
            continue
        for tokens in options.tokens:
            rows += measure(layer, tokens)
            torch.cuda.empty_cache()
            print(f"{layer.model} {layer.name} {tokens}: done", flush=True)
    limits = ceiling()
    stem = ROOT / "docs" / "results" / f"kernels-{slug(torch.cuda.get_device_name(0))}"
    stem.with_suffix(".csv").write_text(as_csv(rows, limits, BASELINE), "utf-8")
    stem.with_suffix(".md").write_text(report(rows, limits), "utf-8")
    print(as_markdown(rows, BASELINE))
    print(f"wrote {stem.relative_to(ROOT)}.csv and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
