"""Take every family of the zoo through every step, each in a process of its own with a time limit.

    python tests/zoo/run.py [--write] [--out FOLDER] [--seconds 300] [--steps build capture none ...] [FAMILY ...]

FOLDER gets a file per family; a family that has one is not run again, so that an interrupted run goes on. At the end
the table is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import one
import torch
from models import names
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


def run_family(name: str, target: Path, steps: list[str], seconds: int) -> dict[str, Any]:
    """Run one family in a fork, which has the libraries already; "died" or "slow" says that it did not end."""
    worker = multiprocessing.get_context("fork").Process(target=one.main, args=(name, target, steps))
    worker.start()
    worker.join(seconds)
    ended, reason = ("died", f"exit code {worker.exitcode}") if worker.exitcode else ("", "")
    if worker.is_alive():
        worker.kill()
        worker.join()
        ended, reason = "slow", f"not done after {seconds} s"
    rows: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    if ended:
        rows["end"] = {"result": ended, "reason": reason, "seconds": seconds}
        target.write_text(json.dumps(rows, indent=1))
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
    parser.add_argument("--steps", nargs="*", default=list(one.STEPS))
    parser.add_argument("--write", action="store_true", help="make the table that ships from everything in --out")
    parser.add_argument("families", nargs="*")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    ordered = [*(name for name in FIRST if name in names()), *(name for name in names() if name not in FIRST)]
    rows: dict[str, dict[str, Any]] = {}
    warm()
    for name in asked.families or ordered:
        target = asked.out / f"{name}.json"
        done = json.loads(target.read_text()) if target.exists() else None
        rows[name] = done or run_family(name, target, asked.steps, asked.seconds)
        print(name, {step: cell["result"] for step, cell in rows[name].items()}, flush=True)
    print(table(rows, asked.steps))
    if asked.write:
        write(asked.out)


if __name__ == "__main__":
    main()
