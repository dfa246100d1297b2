"""A place where something may be quantized: the identity, until a pass replaces it."""

import torch


@torch.library.custom_op("qpcompile::quant_stub", mutates_args=())
def quant_stub(x: torch.Tensor) -> torch.Tensor:
    """x: f[...]; returns a copy (operators of torch.library may not return their input)."""
    return x.clone()


@quant_stub.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
