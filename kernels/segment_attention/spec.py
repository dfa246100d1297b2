"""The record of `qpcompile::segment_attention`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.segment_attention import blocks, cpu
from qpcompile.kernels.segment_attention.op import OVERLOAD, segment_attention
from qpcompile.kernels.segment_attention.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.segment_attention.onnx import segment_attention

    return OnnxForm(segment_attention)


def _probe(device: torch.device) -> None:
    q = noise(1, 4, 7, 12, device=device)
    segment_attention(q, q, q, torch.tensor([0, 3, 7], device=device), 0.3)


SPEC = Spec(
    OVERLOAD,
    RULE,
    _probe,
    since="captured",
    cpu=cpu.segment_attention,
    differentiable=blocks.segment_attention,
    onnx=_onnx,
)
