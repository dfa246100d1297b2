"""float64 operators for which onnxruntime has float32 kernels only, decomposed (for passes/widen_sums.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.emit.onnx.translate.types import TensorInfo

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


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
