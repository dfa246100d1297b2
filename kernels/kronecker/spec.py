"""The record of `qpcompile::kronecker`."""

import torch

from qpcompile.kernels.kronecker import cpu, reference
from qpcompile.kernels.kronecker.op import OVERLOAD, kronecker
from qpcompile.kernels.kronecker.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kronecker.onnx import kronecker

    return OnnxForm(kronecker)


def _probe(device: torch.device) -> None:
    kronecker(noise(3, 48, device=device), None, noise(8, 8, device=device), noise(6, 6, device=device))


SPEC = Spec(
    OVERLOAD, RULE, _probe, since="transformed", cpu=cpu.kronecker, differentiable=reference.kronecker, onnx=_onnx
)
