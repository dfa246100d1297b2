"""The record of `qpcompile::rmsnorm`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rmsnorm import reference
from qpcompile.kernels.rmsnorm.op import OVERLOAD, rmsnorm
from qpcompile.kernels.rmsnorm.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rmsnorm.onnx import rmsnorm

    return OnnxForm(rmsnorm)


def _probe(device: torch.device) -> None:
    rmsnorm(noise(3, 48, device=device), noise(48, device=device), 1e-6)


SPEC = Spec(
    OVERLOAD,
    RULE,
    _probe,
    since="canonical",
    cpu=RULE.checked(reference.rmsnorm),
    differentiable=reference.rmsnorm,
    onnx=_onnx,
)
