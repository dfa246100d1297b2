"""Operand rule of `qpcompile::silu_mul_quantize`."""

from qpcompile.kernels.quantize_int4.rule import transforming

RULE = transforming("qpcompile::silu_mul_quantize", {"gate": "f[..., C]", "up": "=gate[..., C]"})
