"""Operand rule of `qpcompile::layernorm_quantize`."""

from qpcompile.kernels.rules import number
from qpcompile.kernels.transform_quantize.rule import transforming

RULE = transforming(
    "qpcompile::layernorm_quantize", {"x": "f[..., C]", "weight": "f[C]", "bias": "f[C]", "eps": number(0)}
)
