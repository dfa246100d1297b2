"""The record of `qpcompile::silu_mul_quantize`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.silu_mul_quantize import cpu
from qpcompile.kernels.silu_mul_quantize.op import OVERLOAD, silu_mul_quantize
from qpcompile.kernels.silu_mul_quantize.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.silu_mul_quantize.onnx import silu_mul_quantize

    return OnnxForm(silu_mul_quantize)


def _probe(device: torch.device) -> None:
    x = noise(3, 48, device=device)
    silu_mul_quantize(x, x, None, False, 0, 1.0)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.silu_mul_quantize, onnx=_onnx)
