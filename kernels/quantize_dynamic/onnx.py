"""qpcompile::quantize_dynamic in standard ONNX operators: Abs, ReduceMax, Div, Round, Clip."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.quantize_dynamic.reference import group_count, highest

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def quantize_dynamic(x: Any, group_size: int, clip_ratio: float, bits: int) -> tuple[Any, Any]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]. The rank and C of `x` must be known, nothing else."""
    assert x.shape is not None
    return quantize_values(op.Cast(x, to=ir.DataType.FLOAT), x.shape, group_size, clip_ratio, bits)


def quantize_values(values: Any, shape: Any, group_size: int, clip_ratio: float, bits: int) -> tuple[Any, Any]:
    """values: f32[..., C] of the given shape -> q: i8[..., C], scale: f32[..., G]."""
    channels, leading = shape[-1], [0] * (len(shape) - 1)
    assert isinstance(channels, int)
    groups = group_count(channels, group_size)
    if groups > 1:
        values = op.Reshape(values, [*leading, groups, channels // groups])
    absmax = op.ReduceMax(op.Abs(values), [-1], keepdims=1)
    scale = op.Div(op.Mul(absmax, clip_ratio), float(highest(bits)))
    scale = op.Where(op.Equal(scale, 0.0), 1.0, scale)
    codes = rounded(values, scale, bits)
    if groups > 1:
        codes = op.Reshape(codes, [*leading, channels])
        scale = op.Squeeze(scale, [-1])
    return codes, scale


def rounded(values: Any, scale: Any, bits: int) -> Any:
    """values: f32[..., C], scale: f32[..., 1] or f32[1] -> codes: i8[..., C]."""
    codes = op.Clip(op.Round(op.Div(values, scale)), float(-highest(bits) - 1), float(highest(bits)))
    return op.Cast(codes, to=ir.DataType.INT8)
