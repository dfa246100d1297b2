"""The record of `qpcompile::activation_quantize`."""

import torch

from qpcompile.kernels.activation_quantize import cpu
from qpcompile.kernels.activation_quantize.op import OVERLOAD, activation_quantize
from qpcompile.kernels.activation_quantize.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.activation_quantize.onnx import activation_quantize

    return OnnxForm(activation_quantize)


def _probe(device: torch.device) -> None:
    activation_quantize(noise(3, 48, device=device), None, "silu", None, True, None, None, None, 0, 1.0, 8)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.activation_quantize, onnx=_onnx)
