"""Faster CPU implementations of torch operators in bound graphs: same results up to the summation order.

linear            of few rows: kernels/linear
conv2d, conv3d    over pre-extracted patches of the kernel's size (im2col is a view): one matrix product
attention         of many queries: kernels/attention
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qpcompile.ir.convolutions import is_plain
from qpcompile.ir.edit import aten
from qpcompile.kernels.attention.cpu import attention
from qpcompile.kernels.attention.rule import TORCH_RULE
from qpcompile.kernels.linear.cpu import linear


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Positional arguments of torch.nn.functional.scaled_dot_product_attention."""
    if dropout_p or is_causal or not _by_heads(q, k, v):
        TORCH_RULE.check(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attention(q, k, v, attn_mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the operands have the layout of kernels/attention; torch broadcasts any leading sizes."""
    four_axes = q.dim() == k.dim() == v.dim() == 4
    return four_axes and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
    """x: f[B, C, H, W] -> f[B, O, ...]; options as of torch.nn.functional.conv2d."""
    whole = _whole(x, weight, bias, options)
    return F.conv2d(x, weight, bias, *options) if whole is None else whole


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
    """x: f[B, C, T, H, W] -> f[B, O, ...]; options as of torch.nn.functional.conv3d."""
    whole = _whole(x, weight, bias, options)
    return F.conv3d(x, weight, bias, *options) if whole is None else whole


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor | None:
    """One matrix product, if the kernel covers all of x and there is no padding, dilation or grouping."""
    if x.shape[1:] != weight.shape[1:] or not is_plain(*options[1:]):
        return None
    rows = linear(x.flatten(1), weight.flatten(1), bias)
    return rows.view(*rows.shape, *[1] * (x.dim() - 2))


FASTER: dict[Any, Callable[..., Any]] = {
    aten.linear.default: linear,
    aten.conv2d.default: conv2d,
    aten.conv3d.default: conv3d,
    aten.scaled_dot_product_attention.default: attend,
}
