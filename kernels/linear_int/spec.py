"""The record of `qpcompile::linear_int`."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_int import cpu, reference
from qpcompile.kernels.linear_int.op import OVERLOAD, linear_int
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.linear_int.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.linear_int.onnx import linear_int, lower

    return OnnxForm(linear_int, lower)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    # 4-bit weights on 8-bit activations, and 8-bit weights on them.
    q, scale = quantize_dynamic(noise(17, 256, device=device), 0, 1.0, 8)
    made = []
    for bits in (4, 8):
        codes, weight_scale = quantize_dynamic(noise(48, 256, device=device), 0, 1.0, bits)
        made.append((q, scale, stored_codes(codes, bits), weight_scale, None, torch.float32, 8))
    found = torch.cat([linear_int(*operands) for operands in made])
    return found, torch.cat([reference.linear_int(*operands) for operands in made])


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed", cpu=cpu.linear_int, taped=True, onnx=_onnx)
