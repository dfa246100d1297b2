"""The record of `qpcompile::quantize_int4`."""

import torch
from torch import Tensor

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_int4 import cpu, reference
from qpcompile.kernels.quantize_int4.op import OVERLOAD, quantize_int4
from qpcompile.kernels.quantize_int4.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.quantize_int4.onnx import quantize_int4

    return OnnxForm(quantize_int4)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    x = noise(17, 256, device=device)
    return quantize_int4(x, 0, 1.0)[0], reference.quantize_int4(x, 0, 1.0)[0]


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.quantize_int4, onnx=_onnx)
