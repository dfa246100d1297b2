"""The record of `qpcompile::rope`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.rope import cpu
from qpcompile.kernels.rope.op import OVERLOAD, rope
from qpcompile.kernels.rope.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.rope.onnx import rope

    return OnnxForm(rope)


def _probe(device: torch.device) -> None:
    angles = noise(3, 12, device=device)
    rope(noise(1, 2, 3, 12, device=device), angles.cos(), angles.sin())


SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope, taped=True, onnx=_onnx)
