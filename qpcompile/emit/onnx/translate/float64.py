"""float64 operators for which onnxruntime has float32 kernels only, decomposed (for passes/widen_sums.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.emit.onnx.translate.types import TensorInfo

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export

# erf(z) = 2 / pi (z / 4 + sum_{n=1}^{24} exp(-n^2 / 16) sin(n z / 2) / n) + O(1e-16) for |z| < 6, where erf is 1:
# A. J. Strecok, "On the calculation of the inverse of the error function", Math. Comp. 22 (1968), with
# 4 for its 5 and as many terms as float64 can tell apart.
REACH, PERIOD, TERMS = 6.0, 4.0, 24


def gelu(x: Any, approximate: str) -> Any:
    """x: f64[...] -> f64[...], x Phi(x), or its tanh approximation."""
    if approximate == "tanh":
        inner = op.Mul(op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715)), math.sqrt(2.0 / math.pi))
        bell = op.Tanh(inner)
    else:
        bell = erf(op.Mul(x, math.sqrt(0.5)))
    return op.Mul(op.Mul(x, 0.5), op.Add(bell, 1.0))


def erf(z: Any) -> Any:
    """z: f64[...] -> f64[...], to 1e-15: the sine series summed by Clenshaw's recurrence."""
    near = op.Max(op.Min(z, _double(REACH)), _double(-REACH))
    angle = op.Mul(near, 2.0 / PERIOD)
    twice = op.Mul(op.Cos(angle), 2.0)
    later, last = None, _double(_coefficient(TERMS))
    for n in range(TERMS - 1, 0, -1):
        value = op.Add(op.Mul(twice, last), _coefficient(n))
        later, last = last, value if later is None else op.Sub(value, later)
    series = op.Mul(op.Sin(angle), last)
    return op.Mul(op.Add(op.Mul(near, 1.0 / PERIOD), series), 2.0 / math.pi)


def _coefficient(n: int) -> float:
    return math.exp(-((n / PERIOD) ** 2)) / n


def _double(number: float) -> Any:
    return op.Constant(value=ir.tensor(number, dtype=ir.DataType.DOUBLE))


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """x: f64[..., C], weight, bias: f64[C] or None -> f64[..., C]."""
    centred = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
    variance = op.ReduceMean(op.Mul(centred, centred), [-1], keepdims=1)
    y = op.Div(centred, op.Sqrt(op.Add(variance, eps)))
    y = y if weight is None else op.Mul(y, weight)
    return y if bias is None else op.Add(y, bias)


def patch_convolution(out: TensorInfo, x: Any, weight: Any, bias: Any, strides: Sequence[int]) -> Any:
    """x: f64[N, C, ...], weight: f64[D, C, *strides] -> f64[N, D, ...]: patches that do not overlap, as one matrix
    product (im2col).

    Dynamic sizes fall back to the float32 kernel, whose last bit may differ from torch's.
    """
    sides = [side for side in out.shape[2:] if side is not None]
    if len(sides) < len(strides):
        single = [None if each is None else op.Cast(each, to=ir.DataType.FLOAT) for each in (x, weight, bias)]
        return op.Cast(op.Conv(*single, strides=list(strides)), to=ir.DataType.DOUBLE)
    rank, channels = len(strides), weight.shape[1]
    split = [size for pair in zip(sides, strides, strict=True) for size in pair]
    blocks = op.Reshape(x, [0, channels, *split])
    grid = [2 + 2 * axis for axis in range(rank)]
    blocks = op.Transpose(blocks, perm=[0, *grid, 1, *(axis + 1 for axis in grid)])
    rows = op.Reshape(blocks, [0, math.prod(sides), channels * math.prod(strides)])
    matrix = op.Transpose(op.Reshape(weight, [weight.shape[0], -1]), perm=[1, 0])
    y = op.MatMul(rows, matrix)
    y = y if bias is None else op.Add(y, bias)
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1]), [0, weight.shape[0], *sides])
