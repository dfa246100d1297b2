"""The record of `qpcompile::quantize_static`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_static.op import OVERLOAD, quantize_static
from qpcompile.kernels.quantize_static.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.quantize_static.onnx import quantize_static

    return OnnxForm(quantize_static)


def _probe(device: torch.device) -> None:
    quantize_static(noise(3, 48, device=device), torch.ones(1, device=device), 4)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", onnx=_onnx)
