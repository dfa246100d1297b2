"""Operand rule of `qpcompile::rmsnorm_quantize`."""

from qpcompile.kernels.quantize_int4.rule import transforming
from qpcompile.kernels.rules import number

RULE = transforming("qpcompile::rmsnorm_quantize", {"x": "f[..., C]", "weight": "f[C]", "eps": number(0)})
