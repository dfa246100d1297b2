"""Operand rule of `qpcompile::layernorm_quantize`."""

from qpcompile.kernels.quantize_int4.rule import transforming
from qpcompile.kernels.rules import number

RULE = transforming(
    "qpcompile::layernorm_quantize", {"x": "f[..., C]", "weight": "f[C]", "bias": "f[C]", "eps": number(0)}
)
