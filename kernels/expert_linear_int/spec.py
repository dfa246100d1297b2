"""The record of `qpcompile::expert_linear_int`."""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear_int import cpu, reference
from qpcompile.kernels.expert_linear_int.op import OVERLOAD, expert_linear_int
from qpcompile.kernels.expert_linear_int.rule import RULE
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.expert_linear_int.onnx import expert_linear_int

    return OnnxForm(expert_linear_int)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    q, scale = quantize_dynamic(noise(34, 256, device=device).view(17, 2, 256), 0, 1.0, 8)
    index = torch.arange(34, device=device).view(17, 2) * 5 % 3
    found = []
    for bits in (4, 8):
        codes, weight_scale = quantize_dynamic(noise(3 * 48, 256, device=device), 0, 1.0, bits)
        weight = stored_codes(codes, bits).unflatten(0, (3, 48)), weight_scale.unflatten(0, (3, 48))
        operands = (q, scale, *weight, index, torch.float32, 8)
        found.append((expert_linear_int(*operands), reference.expert_linear_int(*operands)))
    ours, theirs = zip(*found, strict=True)
    return torch.cat(ours), torch.cat(theirs)


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.expert_linear_int, onnx=_onnx)
