"""The record of `qpcompile::activation`."""

import torch

from qpcompile.kernels.activation import cpu
from qpcompile.kernels.activation.op import OVERLOAD, activation
from qpcompile.kernels.activation.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.activation.onnx import activation

    return OnnxForm(activation)


def _probe(device: torch.device) -> None:
    activation(noise(3, 48, device=device), noise(3, 48, device=device), "silu")


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.activation, taped=True, onnx=_onnx)
