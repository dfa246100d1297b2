"""The operator `double` is known to every table: rules, CPU kernels, training, probes, artifacts, ONNX."""

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
