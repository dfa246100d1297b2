"""qpcompile::activation_quantize in standard ONNX operators."""

import math
from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.activation_quantize.reference import CUBIC, SLOPE
from qpcompile.kernels.sums_onnx import constant, wide_type
from qpcompile.kernels.transform_quantize.onnx import quantized

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
SLOPES = {"silu": 1.0, "gelu_sigmoid": SLOPE}
"""The functions x sigmoid(slope x)."""
CENTRE = 3.75
SERIES = (
    *(1.2375126308378275, -0.14024059858554697, 0.0035854154854790257, 0.0822767384901452),
    *(-0.10880393014244462, 0.09230432116037748, -0.05869339857664934, 0.028362277418956406),
    *(-0.009746579683265262, 0.0017556258528952954, 0.000293714378044958, -0.0002901540805408417),
    *(5.164652974177416e-05, 2.238423915508223e-05, -1.1438048033346894e-05, -9.73559896736775e-07),
    *(1.7419821586224816e-06, -5.7218230603224086e-08, -2.4857126248016745e-07, 2.3263508708859124e-08),
    *(3.197926671666804e-08, -3.744210080962018e-09, -2.623107347133476e-09, 3.1114333809799254e-10),
)
"""(1 + 2 z) exp(z^2) erfc(z) as a polynomial in (z - CENTRE) / (z + CENTRE), as in cpu.inc; lowest power first."""


def activation_quantize(
    x: Any,
    up: Any,
    function: str,
    transform_scale: Any,
    rotate: bool,
    left: Any,
    right: Any,
    shift: Any,
    group_size: int,
    clip_ratio: float,
    bits: int,
) -> tuple[Any, Any]:
    """x, up: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    assert x.shape is not None
    values = gated(x, up, function)
    return quantized(values, x, transform_scale, rotate, left, right, shift, group_size, clip_ratio, bits)


def gated(x: Any, up: Any, function: str) -> Any:
    """x, up: f[..., C] -> f32[..., C], rounded once: f(x), or f(x) * up."""
    wide = wide_type(x)
    values = activation(op.Cast(x, to=wide), function, wide)
    values = values if up is None else op.Mul(values, op.Cast(up, to=wide))
    return op.Cast(values, to=ir.DataType.FLOAT)


def activation(x: Any, function: str, wide: ir.DataType) -> Any:
    """x: wide[...] -> wide[...]."""
    if function == "gelu" and wide == ir.DataType.FLOAT:
        return op.Gelu(x)
    if function == "gelu":
        z = op.Min(op.Mul(op.Abs(x), constant(math.sqrt(0.5), wide)), constant(30.0, wide))
        tail = op.Mul(_complement(z, wide), constant(0.5, wide))
        positive = op.Sub(constant(1.0, wide), tail)
        return op.Mul(x, op.Where(op.Less(x, constant(0.0, wide)), tail, positive))
    if function in SLOPES:
        return op.Mul(x, sigmoid(op.Mul(x, constant(SLOPES[function], wide)), wide))
    # (1 + tanh(u)) / 2 = sigmoid(2 u)
    cube = op.Mul(op.Mul(op.Mul(x, x), x), constant(CUBIC, wide))
    return op.Mul(x, sigmoid(op.Mul(op.Add(x, cube), constant(math.sqrt(8 / math.pi), wide)), wide))


def sigmoid(x: Any, wide: ir.DataType) -> Any:
    """x: wide[...] -> wide[...]. onnxruntime fuses x Sigmoid(a x) to QuickGelu, which has no float64 kernel."""
    if wide != ir.DataType.DOUBLE:
        return op.Sigmoid(x)
    one = constant(1.0, wide)
    return op.Div(one, op.Add(one, op.Exp(op.Neg(x))))


def _complement(z: Any, wide: ir.DataType) -> Any:
    """z: f64[...] in 0..30 -> erfc(z): f64[...], relative error 4e-15; onnxruntime has Erf and Gelu in float32 only."""
    t = op.Div(op.Sub(z, constant(CENTRE, wide)), op.Add(z, constant(CENTRE, wide)))
    series = constant(SERIES[-1], wide)
    for coefficient in reversed(SERIES[:-1]):
        series = op.Add(op.Mul(series, t), constant(coefficient, wide))
    factor = op.Div(series, op.Add(op.Add(z, z), constant(1.0, wide)))
    return op.Mul(factor, op.Exp(op.Neg(op.Mul(z, z))))
