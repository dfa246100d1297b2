"""The record of `qpcompile::quantize_int4_static`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_int4_static.op import OVERLOAD, quantize_int4_static
from qpcompile.kernels.quantize_int4_static.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.quantize_int4_static.onnx import quantize_int4_static

    return OnnxForm(quantize_int4_static)


def _probe(device: torch.device) -> None:
    quantize_int4_static(noise(3, 48, device=device), torch.ones(1, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", onnx=_onnx)
