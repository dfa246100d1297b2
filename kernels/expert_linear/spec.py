"""The record of `qpcompile::expert_linear`."""

import torch

from qpcompile.kernels.expert_linear import blocks
from qpcompile.kernels.expert_linear.op import OVERLOAD, expert_linear
from qpcompile.kernels.expert_linear.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.expert_linear.onnx import expert_linear

    return OnnxForm(expert_linear)


def _probe(device: torch.device) -> None:
    index = torch.tensor([[0, 2], [1, 0]], device=device)
    expert_linear(noise(2, 1, 12, device=device), noise(3, 5, 12, device=device), index)


SPEC = Spec(OVERLOAD, RULE, _probe, since="captured", differentiable=blocks.expert_linear, onnx=_onnx)
