"""`qpcompile::quantization_risk`: visual tokens by what 4 bits would lose of them. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.quantization_risk import reference

WHERE = "qpcompile::quantization_risk"


@torch.library.custom_op(WHERE, mutates_args=())
def quantization_risk(features: Tensor, counted: Tensor, metric: str, group_size: int) -> Tensor:
    """features: f[B, S, C], counted: bool[B, S], metric: one of METRICS -> f32[B, S] in 0..1."""
    _check(features, counted, metric, group_size)
    return reference.quantization_risk(features, counted, metric, group_size)


@quantization_risk.register_fake
def _(features: Tensor, counted: Tensor, metric: str, group_size: int) -> Tensor:
    _check(features, counted, metric, group_size)
    return features.new_empty(counted.shape, dtype=torch.float32)


def _check(features: Tensor, counted: Tensor, metric: str, group_size: int) -> None:
    if features.dim() != 3 or counted.dim() != 2 or counted.dtype != torch.bool:
        raise KernelError(
            f"features have {features.dim()} dimensions, counted is {counted.dtype} with {counted.dim()}",
            where=WHERE,
            do="give features f[batch, tokens, width] and counted bool[batch, tokens]",
        )
    if metric not in reference.METRICS or group_size < 1:
        raise KernelError(
            f"metric {metric!r}, group size {group_size}",
            where=WHERE,
            do=f"give one of {reference.METRICS} and a positive size",
        )


OVERLOAD = torch.ops.qpcompile.quantization_risk.default
