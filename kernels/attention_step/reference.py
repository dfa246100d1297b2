"""A decode step's attention in one operator, from the projection of queries, keys and values to the next one's codes.

    q', *cache = rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *past, center)
    y = attention_kv(q', *cache, mask, scale, k_bits, v_bits)
    codes, steps = transform_quantize(y, ...)          y: f[B, S, Hq D], the heads of a token side by side

The composition of its parts: each rounds to the type of q, rows in float64 to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv.reference import attention_kv
from qpcompile.kernels.rope_kv_append.reference import rope_kv_append
from qpcompile.kernels.transform_quantize.reference import EpilogueArguments, transform_quantize

Stepped = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""codes: i8[B, S, Hq D], steps: f32[B, S, G], then codes: u8[B, Hkv, P + S, D bits / 8] and affine: f32[B, Hkv, P + S,
2] of keys and of values.
"""


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    center: Tensor | None,
    mask: Tensor | None,
    scale: float,
    *epilogue: *EpilogueArguments,
) -> Stepped:
    """Operands as in rope_kv_append, then mask and scale as in attention_kv, then an epilogue for Hq D channels."""
    cache = k_codes, k_affine, v_codes, v_affine
    written = rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *cache, center)
    return attended(written, mask, scale, k_bits, v_bits, epilogue, attention_kv, transform_quantize)


def attended(
    written: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    epilogue: EpilogueArguments,
    attend: Callable[..., Tensor],
    quantize: Callable[..., Any],
) -> Stepped:
    """The two parts after rope_kv_append, by these functions; written: its result."""
    query, *cache = written
    y = attend(query, *cache, mask, scale, k_bits, v_bits).transpose(1, 2).flatten(2)
    codes, steps = quantize(y.float().double() if y.dtype == torch.float64 else y, *epilogue)
    return codes, steps, cache[0], cache[1], cache[2], cache[3]
