"""The record of `qpcompile::expert_linear_a16`."""

import torch

from qpcompile.kernels.expert_linear_a16 import blocks
from qpcompile.kernels.expert_linear_a16.op import OVERLOAD, expert_linear_a16
from qpcompile.kernels.expert_linear_a16.rule import RULE
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.expert_linear_a16.onnx import expert_linear_a16

    return OnnxForm(expert_linear_a16)


def _probe(device: torch.device) -> None:
    codes, scale = quantize_dynamic(noise(3 * 48, 256, device=device), 0, 1.0, 4)
    weight = pack_int4(codes).unflatten(0, (3, 48)), scale.unflatten(0, (3, 48))
    index = torch.tensor([[0, 2], [1, 0]], device=device)
    expert_linear_a16(noise(2, 256, device=device).view(2, 1, 256), *weight, index)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=blocks.expert_linear_a16, onnx=_onnx)
