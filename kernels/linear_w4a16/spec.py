"""The record of `qpcompile::linear_w4a16`."""

import torch

from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.linear_w4a16 import cpu
from qpcompile.kernels.linear_w4a16.op import OVERLOAD, linear_w4a16
from qpcompile.kernels.linear_w4a16.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.linear_w4a16.onnx import linear_w4a16, lower

    return OnnxForm(linear_w4a16, lower)


def _probe(device: torch.device) -> None:
    codes, weight_scale = quantize_dynamic(noise(48, 256, device=device), 0, 1.0, 4)
    linear_w4a16(noise(3, 256, device=device), pack_int4(codes), weight_scale, None)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.linear_w4a16, taped=True, onnx=_onnx)
