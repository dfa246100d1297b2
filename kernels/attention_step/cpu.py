"""CPU kernel of attention_step: the C calls of its parts. Bound graphs append in place (runtime/growing_cache.py)."""

from __future__ import annotations

from torch import Tensor

from qpcompile.kernels.attention_kv.cpu import attention_kv
from qpcompile.kernels.attention_step.reference import Stepped, attended
from qpcompile.kernels.attention_step.rule import RULE
from qpcompile.kernels.rope_kv_append.cpu import rope_kv_append
from qpcompile.kernels.transform_quantize.cpu import transform_quantize
from qpcompile.kernels.transform_quantize.reference import EpilogueArguments


@RULE.checked
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
    """Shapes as in reference.py."""
    cache = k_codes, k_affine, v_codes, v_affine
    written = rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *cache, center)
    return attended(written, mask, scale, k_bits, v_bits, epilogue, attention_kv, transform_quantize)
