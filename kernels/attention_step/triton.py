"""GPU kernels of attention_step: three launches.

Those of rope_kv_append and of attention_kv on splits of the keys, and one that joins the splits of all heads of a
token, transforms and quantizes them in registers: the values between are not stored. Many rows, and widths that fit no
tile, take the kernels of the parts.
"""

from __future__ import annotations

from torch import Tensor

from qpcompile.kernels.attention_kv.triton import attention_kv, few_rows, partial_sums
from qpcompile.kernels.attention_step.reference import Stepped, attended
from qpcompile.kernels.rope_kv_write.triton import rope_kv_append
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments
from qpcompile.kernels.transform_quantize.triton import Rows, rows_quantize, transform_quantize


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
    query, *grown = written
    if few_rows(query, grown[0]) and query.numel():
        partial = partial_sums(*written, mask, scale, k_bits, v_bits)
        rows = query.transpose(1, 2).flatten(2)
        codes, steps = rows_quantize(Rows("plain", rows, partial=partial), Epilogue(*epilogue))
        return codes, steps, grown[0], grown[1], grown[2], grown[3]
    return attended(written, mask, scale, k_bits, v_bits, epilogue, attention_kv, transform_quantize)
