"""What `qpcompile::silu_mul_quantize` may be given."""

from qpcompile.kernels.quantize_int4.rule import transforming

RULE = transforming("qpcompile::silu_mul_quantize", {"gate": "f[..., C]", "up": "=gate[..., C]"})
