"""Operand rule of `qpcompile::activation_quantize`."""

from qpcompile.kernels.activation_quantize.reference import FUNCTIONS
from qpcompile.kernels.rules import one_of
from qpcompile.kernels.transform_quantize.rule import transforming

RULE = transforming(
    "qpcompile::activation_quantize", {"x": "f[..., C]", "up": "=x[..., C]?", "function": one_of(*FUNCTIONS)}
)
