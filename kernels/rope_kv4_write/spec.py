"""The record of `qpcompile::rope_kv4_write`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rope_kv4_write import cpu
from qpcompile.kernels.rope_kv4_write.op import OVERLOAD, rope_kv4_write
from qpcompile.kernels.rope_kv4_write.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rope_kv4_write.onnx import rope_kv4_write

    return OnnxForm(rope_kv4_write)


def _probe(device: torch.device) -> None:
    q, k, angles = (noise(*sizes, device=device) for sizes in ((1, 4, 3, 12), (1, 2, 3, 12), (1, 1, 3, 12)))
    rope_kv4_write(q, k, k, angles.cos(), angles.sin(), True)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope_kv4_write, taped=True, onnx=_onnx)
