"""The record of `qpcompile::rmsnorm_quantize`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rmsnorm_quantize import cpu
from qpcompile.kernels.rmsnorm_quantize.op import OVERLOAD, rmsnorm_quantize
from qpcompile.kernels.rmsnorm_quantize.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rmsnorm_quantize.onnx import rmsnorm_quantize

    return OnnxForm(rmsnorm_quantize)


def _probe(device: torch.device) -> None:
    rmsnorm_quantize(
        noise(3, 48, device=device), noise(48, device=device), 1e-6, None, True, None, None, None, 0, 1.0, 8
    )


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rmsnorm_quantize, onnx=_onnx)
