"""End to end on the LLaVA testbed: compile with `joint-30`, then ask 200 unseen questions three times.

    make demo        or        python demo/demo.py [--questions 200] [--samples 128] [--out build/demo]

Full precision, the compiled module and the ONNX folder answer the same questions; one table compares them. All outputs
stay in the output folder: questions, artifact, ONNX folder and report.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table

import qpcompile
from qpcompile.capture.data_folder import Question, question_inputs, read_questions
from qpcompile.capture.load import load_model
from qpcompile.cli.terminal import quiet_libraries
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.runner.runner import OnnxVLM, Steps, text_positions
from qpcompile.evaluate.run.accuracy import Generate, Score, accuracy, on_numpy
from qpcompile.evaluate.run.footprint import cache_footprint, decoder_linear_bytes

ROOT = Path(__file__).resolve().parents[1]
TESTBED = ROOT / "tests" / "testbed"
MODEL, CALIBRATION = TESTBED / "llava", TESTBED / "calibration" / "llava"
# Training draws scenes with seed 1, calibration with 3.
SEED = 7
ANSWER_TOKENS, BATCH, CACHES_MEASURED = 4, 20, 10
IN_REPORT = 40


@dataclass(frozen=True)
class Column:
    """One column of the table: the results of one way to run the model."""

    name: str
    score: Score
    seconds: float
    visual_tokens: float
    linear_bytes: int
    cache_bytes: float
    disk_bytes: int


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compile the LLaVA testbed and compare it with full precision.")
    parser.add_argument("--questions", type=int, default=200, help="unseen questions, one per scene")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--recipe", default="joint-30")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    options = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    questions = unseen_questions(options.questions, out / "questions")
    model, processor = load_model(MODEL)
    recipe = qpcompile.Recipe.load(options.recipe).with_overrides([f"calibration.samples={options.samples}"])
    begun = time.monotonic()
    compiled = qpcompile.compile(model, recipe, processor=processor, calibration=CALIBRATION)
    say(f"compiled with {options.recipe} and {options.samples} samples in {time.monotonic() - begun:.1f} s")
    save(compiled, model, questions, out)
    columns = compare(model, compiled, OnnxVLM(out / "onnx"), questions, out)
    show(columns, len(questions), recipe.numerics)
    say(f"kept in {out}: artifact/, onnx/, report.html, questions/")
    say(f"all of this took {time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads")


def unseen_questions(count: int, folder: Path) -> list[Question]:
    """One question on each of `count` scenes that occur neither in training nor in calibration."""
    options = ["--family", "llava", "--count", str(count), "--seed", str(SEED), "--out", str(folder)]
    subprocess.run([sys.executable, str(TESTBED / "scenes.py"), *options], check=True)
    return read_questions(folder)


def save(compiled: CompiledVLM, model: Any, questions: Sequence[Question], out: Path) -> None:
    """Write the artifact, the ONNX folder and the report, for which both models answer some questions one by one."""
    drawn = [(each.image, each.question) for each in questions[:3]]
    asked = {"data": out / "questions", "limit": IN_REPORT, "original": model}
    for name, write in (
        ("artifact", compiled.save_pretrained),
        ("onnx", compiled.export_onnx),
        ("report.html", lambda path: compiled.report(path, drawn, **asked)),
    ):
        begun = time.monotonic()
        write(out / name)
        say(f"wrote {name} in {time.monotonic() - begun:.1f} s")


def compare(
    model: Any, compiled: CompiledVLM, runner: OnnxVLM, questions: Sequence[Question], out: Path
) -> list[Column]:
    """Ask all questions three times."""
    processor = compiled.processor
    some = [question_inputs(processor, [question]) for question in questions[:CACHES_MEASURED]]
    visual = int((some[0]["input_ids"] == compiled.config.image_token_id).sum())
    kept = compiled.plan.visual_tokens(visual)
    rows: list[tuple[str, Generate, float, int, Callable[[dict[str, Any]], int], Path]] = [
        ("full precision", model.generate, visual, fp16_bytes(model), lambda x: fp16_cache(model, x), MODEL),
        (
            "compiled",
            compiled.generate,
            sum(kept) / len(kept),
            decoder_linear_bytes(compiled.program),
            lambda x: compiled_cache(compiled, x),
            out / "artifact",
        ),
        (
            "ONNX",
            on_numpy(runner),
            sum(kept) / len(kept),
            onnx_bytes(out / "onnx" / "prefill.onnx"),
            lambda x: onnx_cache(runner, x),
            out / "onnx",
        ),
    ]
    columns = []
    for name, generate, tokens, weights, cache, folder in rows:
        begun = time.monotonic()
        score = accuracy(generate, processor, questions, BATCH, max_new_tokens=ANSWER_TOKENS, name=name)
        seconds = time.monotonic() - begun
        caches = [cache(inputs) for inputs in some]
        columns.append(Column(name, score, seconds, tokens, weights, sum(caches) / len(caches), model_bytes(folder)))
    return columns


def show(columns: Sequence[Column], count: int, numerics: str) -> None:
    """Print the table, and what its numbers mean."""
    full, compiled, onnx_column = columns
    table = Table(title=f"{count} unseen questions, one per scene", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    rows: list[tuple[str, Callable[[Column], str]]] = [
        ("accuracy", lambda c: f"{100 * c.score.accuracy:.1f} %"),
        ("visual tokens, mean over layers", lambda c: f"{c.visual_tokens:.1f}"),
        ("decoder linear weights, bytes", lambda c: f"{c.linear_bytes:,}"),
        ("KV cache of an answer, bytes", lambda c: f"{c.cache_bytes:,.0f}"),
        ("all weights on disk, bytes", lambda c: f"{c.disk_bytes:,}"),
        (f"time for all, batches of {BATCH}", lambda c: f"{c.seconds:.1f} s"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(column) for column in columns))
    Console(width=110).print(table)
    say("full precision: bytes as fp16, computed in fp32; compiled and ONNX: bytes as stored, scales included")
    say(f"linear weights: {compiled.linear_bytes / full.linear_bytes:.3f} of fp16")
    pairs = zip(compiled.score.answers, onnx_column.score.answers, strict=True)
    alike = sum(a == b for a, b in pairs)
    say(f"ONNX gives the compiled module's answer to {alike} of {count} questions (numerics: {numerics})")


def fp16_bytes(model: Any) -> int:
    """The decoder's linears at two bytes per parameter."""
    linears = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    return sum(2 * parameter.numel() for linear in linears for parameter in linear.parameters())


def fp16_cache(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes at the end of one answer, two per number."""
    return cache_footprint(model.generate, inputs, ANSWER_TOKENS).fp16


def compiled_cache(compiled: CompiledVLM, inputs: dict[str, Any]) -> int:
    """Bytes at the end of one answer, as stored."""
    compiled.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    assert compiled.machine.last is not None
    return compiled.machine.last.nbytes()


def onnx_bytes(path: Path) -> int:
    """The 4-bit initializers of a graph and one float scale for each of their output channels."""
    total = 0
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            total += int(np.prod(tensor.dims)) // 2 + 4 * tensor.dims[-1]
    return total


def onnx_cache(runner: OnnxVLM, inputs: dict[str, Any]) -> int:
    """Bytes at the end of one answer, as the graphs pass the cache on."""
    ids, mask, pixels = (inputs[name].numpy() for name in ("input_ids", "attention_mask", "pixel_values"))
    answer = runner.generate(ids, ANSWER_TOKENS, attention_mask=mask, pixel_values=pixels)[0, ids.shape[1] :]
    steps = Steps(runner, mask, text_positions(mask))
    steps.prefill(ids, runner.encode(pixels))
    for token in answer[:-1]:
        steps.decode(np.array([[token]]))
    return sum(value.numpy().nbytes for name, value in steps.state.items() if name.startswith("past_key_values"))


def model_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights or ONNX graphs."""
    kinds = (".safetensors", ".data", ".onnx")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)


def say(text: str) -> None:
    """Print one line and flush it."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
