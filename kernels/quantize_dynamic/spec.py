"""The record of `qpcompile::quantize_dynamic`."""

import torch
from torch import Tensor

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic import cpu, reference
from qpcompile.kernels.quantize_dynamic.op import OVERLOAD, quantize_dynamic
from qpcompile.kernels.quantize_dynamic.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.quantize_dynamic.onnx import quantize_dynamic

    return OnnxForm(quantize_dynamic)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    x = noise(17, 256, device=device)
    return quantize_dynamic(x, 0, 1.0, 8)[0], reference.quantize_dynamic(x, 0, 1.0, 8)[0]


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.quantize_dynamic, onnx=_onnx)
