"""Time whole answers of 7B models on this GPU: python tests/bench/gpu_answers.py [--models LLaVA-1.5-7B] [--batches 1]

Real configurations, random weights, 576 visual and 64 other tokens, answers of one length. Every peer runs in a
separate process, one after the other. Writes docs/results/answers-<gpu>.csv and .md. `--device cpu --models tiny-A`
tries the script without a GPU.
"""

import argparse
import csv
import io
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_models import MODELS

from qpcompile.kernels.linear_int.tuning import slug

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
NO_GPU = 2
BASELINE = "torch:compile"
PEERS = {
    "torch:eager": "transformers, bf16",
    "torch:compile": "torch.compile, bf16",
    "ours:w4a4kv4": "w4a4kv4",
    "ours:quota-30": "quota-30",
    "grown:quota-30": "quota-30 without CUDA graphs",
}
SEVEN_B = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B")
FIELDS = (
    "first_ms", "first_low", "first_high", "decode_ms", "decode_low", "decode_high", "kv_mb", "peak_mb", "weights_mb",
    "compile_s", "compile_peak_mb", "host_peak_mb",
)  # fmt: skip
# Targets, as the time of the baseline over that of the peer: (batch, field) -> ratio.
TARGETS = {(1, "first_ms"): 2.5, (16, "first_ms"): 3.0, (1, "decode_ms"): 2.2, (16, "decode_ms"): 2.2}
TARGET_PEER = "ours:quota-30"


@dataclass(frozen=True)
class Row:
    """One peer on one model and batch size. `found` is empty if it did not run, and `note` says why."""

    model: str
    peer: str
    batch: int
    found: dict[str, float] = field(default_factory=dict)
    note: str = ""


def run_peer(model: str, peer: str, device: str, new_tokens: int, rounds: int, batches: Sequence[int]) -> list[Row]:
    """A row for each batch size, from one separate process per peer."""
    arguments = [model, peer, device, str(new_tokens), str(rounds), *map(str, batches)]
    command = [sys.executable, str(HERE / "gpu_worker.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {}
    for line in ran.stdout.splitlines():
        if line.startswith('{"batch"'):
            answer = json.loads(line)
            found[answer.pop("batch")] = answer
    last = (ran.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    note = f"exit {ran.returncode}: {last[:300]}"
    return [Row(model, peer, each, found.get(each, {}), "" if each in found else note) for each in batches]


def ratio(rows: Sequence[Row], row: Row, name: str) -> float | None:
    """The time of the baseline on the same model and batch over the row's own."""
    base = [each for each in rows if (each.model, each.peer, each.batch) == (row.model, BASELINE, row.batch)]
    if not base or name not in base[0].found or name not in row.found:
        return None
    return base[0].found[name] / row.found[name]


def as_csv(rows: Sequence[Row]) -> str:
    """All rows; milliseconds, seconds and MB (10^6 bytes). `times_` are ratios to the baseline."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "peer", "batch", *FIELDS, "times_first", "times_decode", "note"))
    for row in rows:
        ratios = [ratio(rows, row, name) for name in ("first_ms", "decode_ms")]
        numbers = [*(row.found.get(name) for name in FIELDS), *ratios]
        cells = ["" if each is None else f"{each:.3f}" for each in numbers]
        writer.writerow((row.model, row.peer, row.batch, *cells, row.note))
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """A table per model and batch size, what did not run, and the targets."""
    parts = []
    for model, batch in dict.fromkeys((row.model, row.batch) for row in rows):
        lines = [
            f"### {model}, batch {batch}",
            "",
            "| | first token ms | times | decode ms | times | tokens/s | KV MB | weights MB | peak MB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if (row.model, row.batch) == (model, batch) and row.found:
                speed = [ratio(rows, row, name) for name in ("first_ms", "decode_ms")]
                times = ["" if each is None else f"{each:.2f}" for each in speed]
                first, decode = row.found["first_ms"], row.found["decode_ms"]
                rest = " | ".join(f"{row.found[name]:,.0f}" for name in ("kv_mb", "weights_mb", "peak_mb"))
                cells = f"{first:.1f} | {times[0]} | {decode:.2f} | {times[1]} | {1e3 * batch / decode:,.0f} | {rest}"
                lines.append(f"| {PEERS[row.peer]} | {cells} |")
        parts.append("\n".join(lines))
    missing = [f"- {row.model}, {PEERS[row.peer]}, batch {row.batch}: {row.note}" for row in rows if row.note]
    if missing:
        parts.append("\n".join(["Did not run:", "", *missing]))
    return "\n\n".join([*parts, _targets(rows)]) + "\n"


def _targets(rows: Sequence[Row]) -> str:
    lines = [
        f"{PEERS[TARGET_PEER]} against {PEERS[BASELINE]}, which keeps every token:",
        "",
        "| model | batch | | asked | found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for (batch, name), asked in TARGETS.items():
            if row.peer == TARGET_PEER and row.batch == batch:
                found = ratio(rows, row, name)
                shown = "not run" if found is None else f"{found:.2f}"
                lines.append(f"| {row.model} | {batch} | {name.removesuffix('_ms')} | {asked} | {shown} |")
    return "\n".join(lines)


def report(rows: Sequence[Row], device: str, new_tokens: int, rounds: int) -> str:
    """The Markdown page."""
    packages = [f"{name} {version(name)}" for name in ("qpcompile", "torch", "transformers")]
    lines = [
        f"# Answers on {device}",
        "",
        "Written by `make bench-gpu` (tests/bench/gpu_answers.py). Real configurations with random weights, 576 visual",
        f"and 64 other tokens, {new_tokens} new ones; medians of {rounds} answers behind two that warm up. Times are",
        "the wall's, with transformers' own loop; `times` is how many times faster than torch.compile in bf16. Memory",
        "is what tensors take; KV is what the cache holds at the end, the room it has for torch.compile. Our models",
        "are compiled with rounded weights and without training (tests/bench/cpu_prepare.py): random weights have",
        "nothing to learn from, and the operators are the same.",
        "",
        f"- {', '.join(packages)}, Python {platform.python_version()}, CUDA {torch.version.cuda}",
        "",
    ]
    return "\n".join(lines) + "\n" + as_markdown(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; returns 2 without a GPU, unless another device was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(SEVEN_B))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("the benchmark of answers needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return NO_GPU
    rows: list[Row] = []
    for model in options.models:
        for peer in options.peers:
            rows += run_peer(model, peer, options.device, options.new_tokens, options.rounds, options.batches)
            print(f"{model} {peer}: {rows[-1].note or 'done'}", flush=True)
    device = torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu"
    stem = options.out / f"answers-{slug(device)}"
    stem.with_suffix(".csv").write_text(as_csv(rows), "utf-8")
    stem.with_suffix(".md").write_text(report(rows, device, options.new_tokens, options.rounds), "utf-8")
    print(as_markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
