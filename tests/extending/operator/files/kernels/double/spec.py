"""The record of double."""

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


SPEC = Spec(
    OVERLOAD,
    RULE,
    _probe,
    since="fused",
    cpu=cpu.double,
    taped=True,
    differentiable=reference.double,
    onnx=_onnx,
)
