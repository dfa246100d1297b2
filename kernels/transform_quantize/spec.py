"""The record of `qpcompile::transform_quantize`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec
from qpcompile.kernels.transform_quantize import cpu
from qpcompile.kernels.transform_quantize.op import OVERLOAD, transform_quantize
from qpcompile.kernels.transform_quantize.rule import RULE


def _onnx() -> OnnxForm:
    from qpcompile.kernels.transform_quantize.onnx import transform_quantize

    return OnnxForm(transform_quantize)


def _probe(device: torch.device) -> None:
    x, left, right = (noise(*sizes, device=device) for sizes in ((3, 48), (8, 8), (6, 6)))
    transform_quantize(x, None, False, left, right, noise(48, device=device), 0, 1.0, 8)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.transform_quantize, onnx=_onnx)
