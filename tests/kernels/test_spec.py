"""Records of operators: every operator has a true one, and the tests that bend operands know it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels.valid_calls import CALLS
from sanitized.expert_operands import EXPERTS
from sanitized.operands import OPERATORS

from qpcompile.ir.operators import SPECS, ours
from qpcompile.kernels.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"


def test_every_folder_with_an_operator_has_a_record() -> None:
    assert [spec.name for spec in SPECS] == sorted(path.parent.name for path in KERNELS.glob("*/op.py"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_record_is_of_its_operator(spec: Spec) -> None:
    assert spec.overload is getattr(ours, spec.name).default
    assert (spec.onnx is not None) == (KERNELS / spec.name / "onnx.py").is_file()
    assert spec.cpu is not None or not spec.taped


def test_tests_bend_every_operator() -> None:
    names = {spec.name for spec in SPECS}
    assert set(CALLS) == names, "tests/kernels/valid_calls.py"
    assert set(OPERATORS | EXPERTS) == names, "tests/sanitized/operands.py"
