"""Cuts inside the decoder: onnxruntime and the compiled module agree, with kept and with new positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.runner.runner import OnnxVLM, Steps
from qpcompile.ir.program import Program
from qpcompile.runtime.machine import Machine
from tests.emit.test_onnx import Cases, arrays, check_same_tokens, compiled

BOTH, FIRST = "tokens.candidate_layers=[0, 1]", "tokens.candidate_layers=[0]"
RESIDUAL = ("tokens.residual_of=input", "tokens.residual_relative=true", "tokens.sink_ratio=4")


def check_same_choice(program: Program, folder: Path, cases: Cases) -> None:
    """After every cut the same tokens are alive."""
    machine, runner = Machine(program), OnnxVLM(folder, threads=1)
    for name, case in cases.items():
        given, cache = arrays(case), machine.prefill(case)
        mask = given["attention_mask"]
        steps = Steps(runner, mask, np.where(mask == 0, 0, np.cumsum(mask, 1) - 1))
        steps.prefill(given["input_ids"], runner.encode(given["pixel_values"]))
        for cut in program.plan.cuts:
            for kind, expected in (("kept", cache.kept), ("alive", cache.alive)):
                found = steps.state[f"{kind}.{cut.layer}"].numpy()
                assert found.tolist() == expected[cut.layer].tolist(), f"{name}, {kind} behind layer {cut.layer}"


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("none", ("tokens.method=fastv", FIRST, "tokens.position_mode=reindex")),
        ("none", ("tokens.method=sparsevlm", BOTH)),
        ("none", ("tokens.method=vtw", FIRST)),
        ("quota-30", (BOTH, "tokens.queries=raters", *RESIDUAL)),
        pytest.param("quota-30", (BOTH, "tokens.scores_of=full_precision"), marks=pytest.mark.slow),
        pytest.param(
            "quota-30", ("tokens.method=pyramiddrop", BOTH, "tokens.position_mode=reindex"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_chosen_tokens_answer_alike(
    compiled_llava: CompiledVLM,
    tiny_llava: tuple[object, Cases],
    tmp_path: Path,
    preset: str,
    settings: tuple[str, ...],
) -> None:
    _, cases = tiny_llava
    program = compiled(compiled_llava.program, cases, preset, "tokens.keep=0.4", "numerics=exact", *settings)
    export_onnx(program, tmp_path / "onnx")
    check_same_tokens(program, tmp_path / "onnx", cases)
    check_same_choice(program, tmp_path / "onnx", cases)
