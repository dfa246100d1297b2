"""Operand rule of `qpcompile::rmsnorm_quantize`."""

from qpcompile.kernels.rules import number
from qpcompile.kernels.transform_quantize.rule import transforming

RULE = transforming("qpcompile::rmsnorm_quantize", {"x": "f[..., C]", "weight": "f[C]", "eps": number(0)})
