"""Quantization stub: an identity operator that marks a quantizable value until a pass replaces it."""

import torch

from qpcompile.kernels.quant_stub.rule import RULE


@torch.library.custom_op("qpcompile::quant_stub", mutates_args=())
def quant_stub(x: torch.Tensor) -> torch.Tensor:
    """x: f[...]; returns a copy (operators of torch.library may not return their input)."""
    RULE.check(x)
    return x.clone()


@quant_stub.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    RULE.check(x)
    return torch.empty_like(x)


OVERLOAD = torch.ops.qpcompile.quant_stub.default
