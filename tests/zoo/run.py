"""Take every family of the zoo through every step, each in a process of its own with a time limit.

    python tests/zoo/run.py [--write] [--out FOLDER] [--seconds 300] [--workers 2] [--steps build ...] [FAMILY ...]

FOLDER gets a file per family; a family that has one is not run again, so that an interrupted run goes on. At the end
the table is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from typing import Any

import one
import torch
from models import names
from shape import SHAPES
from transformers.exporters.utils import apply_patches

from qpcompile.cli import families

ROOT = Path(__file__).resolve().parents[2]

# Asked for most: they come first, so that an interrupted run says most.
FIRST = (
    *(
        "llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "gemma3",
        "gemma3n",
        "gemma4",
    ),
    *("llama4", "mllama", "internvl", "smolvlm", "idefics3", "mistral3", "lfm2_vl", "minicpmv4_6", "llava_onevision"),
    *("llava_next", "paligemma", "glm4v", "glm4v_moe", "glm_ocr", "deepseek_vl", "kimi_k25", "aya_vision", "molmo2"),
    *("granite_docling", "ernie4_5_vl_moe", "qwen2_5_omni_thinker", "paddleocr_vl", "got_ocr2", "janus", "florence2"),
)


def warm() -> None:
    """Import what tracing needs, so that every fork has it: the exporter looks into the modules of many families."""
    with apply_patches("dynamo"):
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),))


def run_families(
    wanted: Sequence[str], folder: Path, steps: list[str], seconds: int, workers: int, shape: str = "standard"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run families in forks, which have the libraries already, `workers` at a time, and give each with its rows; those
    that have a file in the folder come first.
    """
    done = {name: folder / f"{name}.json" for name in wanted if (folder / f"{name}.json").exists()}
    for name, path in done.items():
        yield name, json.loads(path.read_text())
    waiting = [name for name in wanted if name not in done]
    running: dict[str, tuple[Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            arguments = (name, folder / f"{name}.partial", steps, shape)
            worker = multiprocessing.get_context("fork").Process(target=one.main, args=arguments)
            worker.start()
            running[name] = worker, time.monotonic() + seconds
        left = min(end for _, end in running.values()) - time.monotonic()
        connection.wait([worker.sentinel for worker, _ in running.values()], max(left, 0.0))
        for name, (worker, end) in list(running.items()):
            late = time.monotonic() >= end
            if late or not worker.is_alive():
                del running[name]
                yield name, _ended(worker, folder / f"{name}.partial", seconds)


def _ended(worker: Any, partial: Path, seconds: int) -> dict[str, Any]:
    """The rows of a worker that has ended, or that has had its time; "died" or "slow" says that it did not end well."""
    ended, reason = "", ""
    if worker.is_alive():
        worker.kill()
        ended, reason = "slow", f"not done after {seconds} s"
    worker.join()
    if not ended and worker.exitcode:
        ended, reason = "died", f"exit code {worker.exitcode}"
    rows: dict[str, Any] = json.loads(partial.read_text()) if partial.exists() else {}
    if ended:
        rows["end"] = {"result": ended, "reason": reason, "seconds": seconds}
    partial.write_text(json.dumps(rows, indent=1))
    # Only what has ended counts: an interrupted run does a family again.
    partial.replace(partial.with_suffix(".json"))
    return rows


def table(rows: dict[str, dict[str, Any]], steps: list[str]) -> str:
    """One line per family: how each step ended, and the first reason."""
    lines = [" | ".join(["family", *steps, "first reason"])]
    for name, row in rows.items():
        cells = [row.get(step, {}).get("result", "-") for step in steps]
        reason = next((cell["reason"] for cell in row.values() if cell["result"] != "ok"), "")
        lines.append(" | ".join([name, *cells, " ".join(reason.split())[:260]]))
    for step in steps:
        results = [row.get(step, {}).get("result", "-") for row in rows.values()]
        lines.append(f"{step}: " + ", ".join(f"{results.count(kind)} {kind}" for kind in sorted(set(results))))
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write the table that ships with the package, and docs/families.md."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    packages = ("qpcompile", "transformers", "torch", "onnxruntime")
    versions = {"date": date.today().isoformat(), **{name: metadata.version(name) for name in packages}}
    whole = {"versions": versions, "families": found}
    families.TABLE.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "families.md").write_text(families.page(whole), encoding="utf-8")


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("zoo-results"))
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="families at a time")
    parser.add_argument("--steps", nargs="*", default=list(one.STEPS))
    parser.add_argument("--shape", choices=SHAPES, default="standard", help="the sizes of the models and prompts")
    parser.add_argument("--write", action="store_true", help="make the table that ships from everything in --out")
    parser.add_argument("families", nargs="*")
    asked = parser.parse_args()
    if asked.write and asked.shape != "standard":
        parser.error("--write makes the table of the standard shape")
    asked.out.mkdir(parents=True, exist_ok=True)
    ordered = [*(name for name in FIRST if name in names()), *(name for name in names() if name not in FIRST)]
    rows: dict[str, dict[str, Any]] = {}
    warm()
    wanted, started = asked.families or ordered, time.monotonic()
    for name, row in run_families(wanted, asked.out, asked.steps, asked.seconds, asked.workers, asked.shape):
        rows[name] = row
        minutes = (time.monotonic() - started) / 60
        said = {step: cell["result"] for step, cell in row.items()}
        print(f"{len(rows)} of {len(wanted)}, {minutes:.1f} min: {name} {said}", flush=True)
    print(table(rows, asked.steps))
    if asked.write:
        write(asked.out)


if __name__ == "__main__":
    main()
