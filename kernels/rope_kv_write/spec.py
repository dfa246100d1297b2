"""The record of `qpcompile::rope_kv_write`."""

import torch

from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rope_kv_write import cpu
from qpcompile.kernels.rope_kv_write.op import OVERLOAD, rope_kv_write
from qpcompile.kernels.rope_kv_write.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rope_kv_write.onnx import rope_kv_write

    return OnnxForm(rope_kv_write)


def _probe(device: torch.device) -> None:
    q, k, angles = (noise(*sizes, device=device) for sizes in ((1, 4, 3, 12), (1, 2, 3, 12), (1, 1, 3, 12)))
    for k_bits in BITS:
        rope_kv_write(q, k, k, angles.cos(), angles.sin(), True, k_bits, 4)


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope_kv_write, taped=True, onnx=_onnx)
