"""Greedy choices before the decoder: onnxruntime and the compiled module agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from tests.emit.test_onnx import Cases, check_same_tokens, compiled, operators

KEEP = "tokens.keep=0.4"


@pytest.mark.parametrize(
    ("preset", "method", "loops"),
    [("none", "cdpruner", 1), ("qapruner-12.5", "qapruner", 1), ("none", "divprune", 1), ("none", "dart", 0)],
)
def test_chosen_tokens_answer_alike(
    compiled_llava: CompiledVLM,
    tiny_llava: tuple[object, Cases],
    tmp_path: Path,
    preset: str,
    method: str,
    loops: int,
) -> None:
    _, cases = tiny_llava
    program = compiled(compiled_llava.program, cases, preset, f"tokens.method={method}", KEEP, "numerics=exact")
    export_onnx(program, tmp_path / "onnx")
    check_same_tokens(program, tmp_path / "onnx", cases)
    found = operators(tmp_path / "onnx", "prefill")
    assert found["Loop"] == loops and found["TopK"] >= 2
