"""The record of `qpcompile::rope_kv4_append`."""

import torch

from qpcompile.kernels.kv4_write.op import kv4_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rope_kv4_append import cpu
from qpcompile.kernels.rope_kv4_append.op import OVERLOAD, rope_kv4_append
from qpcompile.kernels.rope_kv4_append.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rope_kv4_append.onnx import rope_kv4_append

    return OnnxForm(rope_kv4_append)


def _probe(device: torch.device) -> None:
    q, k, angles = (noise(*sizes, device=device) for sizes in ((1, 4, 1, 12), (1, 2, 1, 12), (1, 1, 1, 12)))
    past = kv4_write(noise(1, 2, 5, 12, device=device))
    rope_kv4_append(q, k, k, angles.cos(), angles.sin(), True, *past, *past)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope_kv4_append, onnx=_onnx)
