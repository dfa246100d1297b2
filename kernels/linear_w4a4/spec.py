"""The record of `qpcompile::linear_w4a4`."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a4 import cpu, reference
from qpcompile.kernels.linear_w4a4.op import OVERLOAD, linear_w4a4
from qpcompile.kernels.linear_w4a4.packing import pack_int4
from qpcompile.kernels.linear_w4a4.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_int4.op import quantize_int4
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.linear_w4a4.onnx import linear_w4a4, lower

    return OnnxForm(linear_w4a4, lower)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    q, scale = quantize_int4(noise(17, 256, device=device), 0, 1.0)
    codes, weight_scale = quantize_int4(noise(48, 256, device=device), 0, 1.0)
    operands = (q, scale, pack_int4(codes), weight_scale, None, torch.float32)
    return linear_w4a4(*operands), reference.linear_w4a4(*operands)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.linear_w4a4, taped=True, onnx=_onnx)
