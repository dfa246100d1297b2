"""The record of `qpcompile::layernorm_quantize`."""

import torch

from qpcompile.kernels.layernorm_quantize import cpu
from qpcompile.kernels.layernorm_quantize.op import OVERLOAD, layernorm_quantize
from qpcompile.kernels.layernorm_quantize.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.layernorm_quantize.onnx import layernorm_quantize

    return OnnxForm(layernorm_quantize)


def _probe(device: torch.device) -> None:
    x, weight = noise(3, 48, device=device), noise(48, device=device)
    layernorm_quantize(x, weight, weight, 1e-6, None, True, None, None, None, 0, 1.0, 8)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.layernorm_quantize, onnx=_onnx)
