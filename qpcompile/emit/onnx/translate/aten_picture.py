"""ATen operators in standard ONNX operators: sampling and pooling of pictures, and writes at indices or under a mask.

The conventions are those of aten.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21

from qpcompile.emit.onnx.translate.aten import Translation
from qpcompile.emit.onnx.translate.aten_shape import place_of
from qpcompile.emit.onnx.translate.types import TensorInfo, cast
from qpcompile.errors import ExportError

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
aten = torch.ops.aten

_SAMPLING, _BORDERS = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")


def _linear_resize(target: Any, axes: int) -> Translation:
    """An operator that maps every one of the last `axes` axes linearly, for constant sizes: a product with a matrix for
    each axis. The matrices are torch's own results for unit vectors.
    """

    def translate(out: TensorInfo, x: Any, *args: Any, **named: Any) -> Any:
        before, after = list(x.shape)[-axes:], list(out.shape)[-axes:]
        if not all(isinstance(size, int) for size in (*before, *after)):
            raise ExportError("a picture of a size that varies is resized", do="report this family")
        for axis, size in enumerate(before):
            # The unit vectors of one axis, all along the other one, where weights sum to 1.
            probe = torch.eye(size, dtype=torch.float64).view(size, *(size if a == axis else 1 for a in range(axes)))
            made = target(probe.expand(1, size, *before), *args, **named)[0]
            matrix = made.to(torch.float32).flatten(1) if axes == 1 else made.to(torch.float32).select(1 - axis + 1, 0)
            if axis == axes - 1:
                x = op.MatMul(x, op.Constant(value=ir.tensor(matrix.contiguous().numpy())))
            else:
                x = op.MatMul(op.Constant(value=ir.tensor(matrix.T.contiguous().numpy())), x)
        return x

    return translate


def _grid_sampler(_: TensorInfo, x: Any, grid: Any, mode: int, border: int, align_corners: bool) -> Any:
    return op.GridSample(x, grid, mode=_SAMPLING[mode], padding_mode=_BORDERS[border], align_corners=int(align_corners))


def _average_pool(
    _: TensorInfo,
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    if divisor is not None:
        raise ExportError("a pool with a divisor of its own has no translation", do="report this family")
    kernel = list(kernel) * (2 if len(kernel) == 1 else 1)
    strides = [*stride] * (2 if len(stride) == 1 else 1) or kernel
    pads = [padding] * 2 if isinstance(padding, int) else [*padding] * (2 if len(padding) == 1 else 1)
    options = {"ceil_mode": int(ceil_mode), "count_include_pad": int(count_padding)}
    return op.AveragePool(x, kernel_shape=kernel, strides=strides, pads=[*pads, *pads], **options)


def _pixel_shuffle(out: TensorInfo, x: Any, factor: int) -> Any:
    channels, height, width = _known(out.shape[-3:])
    blocks = op.Reshape(x, [-1, channels, factor, factor, height // factor, width // factor])
    return op.Reshape(op.Transpose(blocks, perm=[0, 1, 4, 2, 5, 3]), [-1, *_known(out.shape[-3:])])


def _pixel_unshuffle(out: TensorInfo, x: Any, factor: int) -> Any:
    channels, height, width = _known(out.shape[-3:])
    blocks = op.Reshape(x, [-1, channels // factor**2, height, factor, width, factor])
    return op.Reshape(op.Transpose(blocks, perm=[0, 1, 3, 5, 2, 4]), [-1, channels, height, width])


def _known(sizes: Sequence[Any]) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise ExportError("a picture of a size that varies is cut into blocks", do="report this family")
    return list(sizes)


def _im2col(
    _: TensorInfo, x: Any, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Any:
    """Blocks of f[B, C, H, W] as columns, f[B, C * kernel, blocks]."""
    channels, height, width = _known(x.shape[1:])
    if any(padding):
        raise ExportError("blocks beyond the border of a picture have no translation", do="report this family")
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    index = aten.im2col.default(places, kernel, dilation, padding, stride)[0].long()
    blocks = op.Gather(op.Reshape(x, [-1, channels, height * width]), index.numpy(), axis=2)
    return op.Reshape(blocks, [-1, channels * len(index), index.shape[1]])


def _unfold(_: TensorInfo, x: Any, axis: int, size: int, step: int) -> Any:
    """Windows along an axis, which become the last one."""
    axis %= len(x.shape)
    (length,) = _known(x.shape[axis : axis + 1])
    windows = op.Gather(x, torch.arange(length).unfold(0, size, step).contiguous().numpy(), axis=axis)
    rank = len(x.shape) + 1
    return op.Transpose(windows, perm=[*(at for at in range(rank) if at != axis + 1), axis + 1])


def _masked_scatter(_: TensorInfo, x: Any, mask: Any, source: Any) -> Any:
    """The values of `source`, one after the other, where the mask is set."""
    shape = op.Shape(x)
    wide = op.Expand(mask, shape)
    order = op.Sub(op.CumSum(op.Reshape(op.Cast(wide, to=ir.DataType.INT64), [-1]), 0), 1)
    values = op.Gather(op.Reshape(source, [-1]), op.Max(order, 0), axis=0)
    return op.Where(wide, op.Reshape(values, shape), x)


def _index_put(out: TensorInfo, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    """x[i, j, ...] = values, or x[mask] = values, on leading axes."""
    given = [index for index in indices if index is not None]
    if accumulate or len(given) != len(indices):
        raise ExportError("an indexed write that adds up, or skips axes, has no translation", do="report this family")
    values = cast(values, out.dtype)
    if len(given) == 1 and given[0].dtype == ir.DataType.BOOL:
        (mask,) = given
        deeper = [1] * (len(x.shape) - len(mask.shape))
        mask = op.Reshape(mask, op.Concat(op.Shape(mask), deeper, axis=0)) if deeper else mask
        return op.Where(mask, values, x) if len(values.shape) == 0 else _masked_scatter(out, x, mask, values)
    if any(index.dtype == ir.DataType.BOOL for index in given):
        raise ExportError("a write under a mask and at indices has no translation", do="report this family")
    places = place_of(given)
    depth = len(given)
    rest = op.Shape(x, start=depth) if depth < len(x.shape) else op.Constant(value=ir.tensor(np.zeros(0, np.int64)))
    shape = op.Concat(op.Shape(places, end=-1), rest, axis=0)
    return op.ScatterND(x, places, op.Expand(values, shape))


def table() -> dict[Any, Translation]:
    """Operator overload -> translation."""
    planes = (
        aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_nearest2d.vec,
        aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec, aten.adaptive_avg_pool2d.default,
        aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default,
        aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default,
    )  # fmt: skip
    lines = (aten.upsample_linear1d.vec, aten.upsample_nearest1d.vec, aten.adaptive_avg_pool1d.default)
    return {
        **{target: _linear_resize(target, 2) for target in planes},
        **{target: _linear_resize(target, 1) for target in lines},
        aten.grid_sampler.default: _grid_sampler,
        aten.grid_sampler_2d.default: _grid_sampler,
        aten.avg_pool2d.default: _average_pool,
        aten.im2col.default: _im2col,
        aten.unfold.default: _unfold,
        aten.pixel_shuffle.default: _pixel_shuffle,
        aten.pixel_unshuffle.default: _pixel_unshuffle,
        aten.masked_scatter.default: _masked_scatter,
        aten.index_put.default: _index_put,
    }
