"""The record of `qpcompile::rope_kv_append`."""

import torch

from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rope_kv_append import cpu
from qpcompile.kernels.rope_kv_append.op import OVERLOAD, rope_kv_append
from qpcompile.kernels.rope_kv_append.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rope_kv_append.onnx import rope_kv_append

    return OnnxForm(rope_kv_append)


def _probe(device: torch.device) -> None:
    q, k, angles = (noise(*sizes, device=device) for sizes in ((1, 4, 1, 12), (1, 2, 1, 12), (1, 1, 1, 12)))
    keys, values = (kv_write(noise(1, 2, 5, 12, device=device), bits) for bits in (8, 4))
    rope_kv_append(q, k, k, angles.cos(), angles.sin(), True, 8, 4, *keys, *values)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope_kv_append, onnx=_onnx)
