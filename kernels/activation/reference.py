"""Activation function or gated linear unit: y = f(x), or f(x) * up.

The functions are those of activation_quantize. Computed in `wide_type` and rounded once to float32, then to the type
of x.
"""

from torch import Tensor

from qpcompile.kernels.activation_quantize import reference


def activation(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    """x, up: f[..., C], function: one of activation_quantize's `FUNCTIONS` -> as x."""
    return reference.activation(x, up, function).to(x.dtype)
