"""expert_linear_a16 as one product per expert that was chosen, by the operators for linear layers, on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear.blocks import per_expert
from qpcompile.kernels.expert_linear_a16.rule import RULE
from qpcompile.kernels.linear_w4a16.op import OVERLOAD as LINEAR_W4A16
from qpcompile.kernels.linear_w8a16.op import OVERLOAD as LINEAR_W8A16
from qpcompile.kernels.quantize_dynamic.reference import dequantize


@RULE.checked
def expert_linear_a16(x: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor) -> Tensor:
    """Shapes as in reference.py. Raises KernelError unless every value of the index names an expert."""

    def product(expert: int, rows: Tensor) -> Tensor:
        own, scale = weight[expert], weight_scale[expert]
        if own.dtype == torch.uint8:
            return LINEAR_W4A16(rows, own, scale, None)
        if scale.shape[1] == 1:
            return LINEAR_W8A16(rows, own, scale, None)
        return torch.nn.functional.linear(rows, dequantize(own, scale).to(rows.dtype))

    experts, outputs, _ = weight.shape
    return per_expert((x,), index, experts, product, x.new_empty(0, outputs))
