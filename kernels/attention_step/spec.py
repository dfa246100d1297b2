"""The record of `qpcompile::attention_step`."""

import torch

from qpcompile.kernels.attention_step import cpu
from qpcompile.kernels.attention_step.op import OVERLOAD, attention_step
from qpcompile.kernels.attention_step.rule import RULE
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.attention_step.onnx import attention_step

    return OnnxForm(attention_step)


def _probe(device: torch.device) -> None:
    q, k, angles = (noise(*sizes, device=device) for sizes in ((1, 4, 1, 12), (1, 2, 1, 12), (1, 1, 1, 12)))
    keys, values = (kv_write(noise(1, 2, 5, 12, device=device), bits) for bits in (8, 4))
    turned = q, k, k, angles.cos(), angles.sin(), True, 8, 4, *keys, *values
    attention_step(*turned, None, None, 0.3, None, True, None, None, None, 0, 1.0, 4)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.attention_step, onnx=_onnx)
