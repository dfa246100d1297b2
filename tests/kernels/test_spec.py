"""Records of operators: every operator has a true one, and adding an operator takes a folder and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.valid_calls import CALLS
from sanitized.operands import OPERATORS

from qpcompile.ir.operators import SPECS, ours
from qpcompile.kernels.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"

DOUBLE = {
    "reference.py": """
from torch import Tensor


def double(x: Tensor) -> Tensor:
    return 2 * x
""",
    "rule.py": """
from qpcompile.kernels.rules import Rule

RULE = Rule("qpcompile::double", {"x": "f[..., C]"}, gives=("=x[..., C]",))
""",
    "op.py": """
import torch
from torch import Tensor

from qpcompile.kernels.double.cpu import double as on_cpu
from qpcompile.kernels.double.rule import RULE


@torch.library.custom_op("qpcompile::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return on_cpu(x)


@double.register_fake
def _(x: Tensor) -> Tensor:
    return RULE.fake(x)


OVERLOAD = torch.ops.qpcompile.double.default
""",
    "cpu.py": """
from torch import Tensor

from qpcompile.kernels.double.rule import RULE


@RULE.checked
def double(x: Tensor) -> Tensor:
    return x + x
""",
    "onnx.py": """
from typing import Any

from onnxscript import opset21


def double(x: Any) -> Any:
    return opset21.Add(x, x)
""",
    "spec.py": """
import torch

from qpcompile.kernels.double import cpu, reference
from qpcompile.kernels.double.op import OVERLOAD, double
from qpcompile.kernels.double.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.double.onnx import double

    return OnnxForm(double)


def _probe(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = noise(3, 4, device=device)
    return double(x), reference.double(x)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.double, taped=True, onnx=_onnx,
            differentiable=reference.double)
""",
}
ASKS = """
import torch
from torch import fx

from qpcompile.calibration.blocks import PLAIN
from qpcompile.cli.probes import PROBES, probe
from qpcompile.emit.artifact.allowed_operators import OPERATORS
from qpcompile.emit.onnx.export import OWN, TORCH
from qpcompile.emit.onnx.translate.nodes import to_onnx
from qpcompile.emit.onnx.wrap import Part
from qpcompile.errors import KernelError
from qpcompile.ir.operators import RULES
from qpcompile.kernels.double import cpu, reference
from qpcompile.runtime.cpu import bind, tape

double = torch.ops.qpcompile.double.default
assert RULES[double].signature == "x: f[..., C]"
try:
    double(torch.ones(2, dtype=torch.int64))
except KernelError as error:
    assert error.where == "qpcompile::double, operand x"
else:
    raise AssertionError("whole numbers are let through")
assert bind.KERNELS[double] is cpu.double and cpu.double in tape.KERNELS and PLAIN[double] is reference.double
assert "double" in PROBES and not probe("double", torch.device("cpu"))
assert "qpcompile::double.default" in OPERATORS
part = Part(fx.symbolic_trace(lambda x: (double(x),)), ("x",), ("y",))
model = to_onnx("test", part, ({"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}), (TORCH, OWN))
assert [node.op_type for node in model.graph] == ["Add"]
"""


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
    assert set(OPERATORS) == names, "tests/sanitized/operands.py"


def test_a_folder_is_all_that_an_operator_takes(tmp_path: Path) -> None:
    """In a copy of the kernels beside links to everything else."""
    package = tmp_path / "qpcompile"
    package.mkdir()
    for source in (ROOT / "qpcompile").iterdir():
        if source.name != "kernels":
            (package / source.name).symlink_to(source)
    shutil.copytree(KERNELS, package / "kernels")
    (package / "kernels" / "double").mkdir()
    for name, text in DOUBLE.items():
        (package / "kernels" / "double" / name).write_text(text, "utf-8")
    here = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASKS], env=here, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
