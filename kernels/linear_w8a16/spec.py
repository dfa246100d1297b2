"""The record of `qpcompile::linear_w8a16`."""

import torch

from qpcompile.kernels.linear_w8a16 import cpu
from qpcompile.kernels.linear_w8a16.op import OVERLOAD, linear_w8a16
from qpcompile.kernels.linear_w8a16.reference import quantize_rows
from qpcompile.kernels.linear_w8a16.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.linear_w8a16.onnx import linear_w8a16

    return OnnxForm(linear_w8a16)


def _probe(device: torch.device) -> None:
    codes, weight_scale = quantize_rows(noise(48, 256, device=device))
    linear_w8a16(noise(3, 256, device=device), codes, weight_scale, None)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.linear_w8a16, taped=True, onnx=_onnx)
