"""The record of `qpcompile::linear_int`."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_int import cpu, reference
from qpcompile.kernels.linear_int.op import OVERLOAD, linear_int
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.linear_int.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.linear_int.onnx import linear_int, lower

    return OnnxForm(linear_int, lower)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    q, scale = quantize_dynamic(noise(17, 256, device=device), 0, 1.0)
    codes, weight_scale = quantize_dynamic(noise(48, 256, device=device), 0, 1.0)
    operands = (q, scale, pack_int4(codes), weight_scale, None, torch.float32)
    return linear_int(*operands), reference.linear_int(*operands)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.linear_int, taped=True, onnx=_onnx)
