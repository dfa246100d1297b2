"""ATen operators in standard ONNX operators: sorting, choosing and counting, and writes at places along one axis.

The conventions are those of aten.py.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

from qpcompile.emit.onnx.translate.aten import Translation
from qpcompile.emit.onnx.translate.aten_shape import size_of
from qpcompile.emit.onnx.translate.types import TensorInfo, cast, onnx_type
from qpcompile.errors import ExportError

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
aten = torch.ops.aten


def _topk(_: Any, x: Any, k: Any, dim: int = -1, largest: bool = True, in_order: bool = True) -> Any:
    count = op.Reshape(k, [1]) if isinstance(k, ir.Value) else [k]
    return op.TopK(x, count, axis=dim, largest=int(largest), sorted=int(in_order))


def _sort(_: Any, x: Any, dim: int = -1, descending: bool = False, **named: Any) -> Any:
    """onnxruntime's TopK breaks ties by the lower index: a stable sort."""
    axis = dim % len(x.shape)
    return op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)


def _sort_stable(_: Any, x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return _sort(_, x, dim, descending)


def _extreme(reduce: str, place: str) -> Translation:
    """The largest or smallest along an axis, and where it is."""

    def translate(_: Any, x: Any, dim: int, keepdim: bool = False) -> Any:
        value = getattr(op, reduce)(x, [dim], keepdims=int(keepdim))
        return value, getattr(op, place)(x, axis=dim, keepdims=int(keepdim))

    return translate


def _one_hot(_: TensorInfo, index: Any, classes: int = -1) -> Any:
    if classes < 0:
        raise ExportError("one-hot vectors of a length that values decide have no translation", do="report this family")
    places = op.Range(0, classes, 1)
    return op.Cast(op.Equal(op.Unsqueeze(index, [-1]), places), to=ir.DataType.INT64)


def _scatter(out: TensorInfo, x: Any, dim: int, index: Any, source: Any, **named: Any) -> Any:
    source = cast(source, out.dtype)
    if not isinstance(source, ir.Value) or len(source.shape or ()) == 0:
        source = op.Expand(source, op.Shape(index))
    return op.ScatterElements(x, index, source, axis=dim)


def _scatter_add(out: TensorInfo, x: Any, dim: int, index: Any, source: Any) -> Any:
    return op.ScatterElements(x, index, cast(source, out.dtype), axis=dim, reduction="add")


def _index_add(out: TensorInfo, x: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Any:
    if dim % len(x.shape) or alpha != 1:
        raise ExportError("rows are added along another axis than the first", do="report this family")
    return op.ScatterND(x, op.Unsqueeze(index, [-1]), cast(source, out.dtype), reduction="add")


def _bucketize(out: TensorInfo, x: Any, bounds: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """How many of the sorted bounds are below each number, or, with `right`, not above it."""
    wide = op.Unsqueeze(x, [-1])
    passed = op.GreaterOrEqual(wide, bounds) if right else op.Greater(wide, bounds)
    return op.ReduceSum(op.Cast(passed, to=onnx_type[out.dtype]), [-1], keepdims=0)


def _all(_: TensorInfo, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    axes = None if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return cast(op.ReduceMin(cast(cast(x, torch.bool), torch.int32), axes, keepdims=int(keepdim)), torch.bool)


def _softplus(out: TensorInfo, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """log(1 + exp(beta x)) / beta, and x itself beyond the threshold, as torch."""
    scaled = op.Mul(x, cast(beta, out.dtype))
    limit = cast(threshold, out.dtype)
    bent = op.Log(op.Add(op.Exp(op.Min(scaled, limit)), cast(1.0, out.dtype)))
    return op.Where(op.Greater(scaled, limit), x, op.Div(bent, cast(beta, out.dtype)))


def _einsum(_: TensorInfo, equation: str, operands: Any, **named: Any) -> Any:
    return op.Einsum(*operands, equation=equation)


def _group_norm(
    out: TensorInfo, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    """x: f[B, C, ...], normalized over the channels of a group and all that follows."""
    shape = op.Shape(x)
    rows = op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), [groups], [-1], axis=0))
    middle = op.Sub(rows, op.ReduceMean(rows, [2], keepdims=1))
    spread = op.ReduceMean(op.Mul(middle, middle), [2], keepdims=1)
    y = op.Reshape(op.Div(middle, op.Sqrt(op.Add(spread, cast(eps, out.dtype)))), shape)
    deeper = [1] * (len(x.shape) - 2)
    for factor, combine in ((weight, op.Mul), (bias, op.Add)):
        y = y if factor is None else combine(y, op.Reshape(factor, [-1, *deeper]))
    return y


def _batch_norm(
    out: TensorInfo, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any
) -> Any:
    _, eps, *_ = rest
    if training:
        raise ExportError("a batch norm in training has no translation", do="put the model in eval mode")
    deeper = [1] * (len(x.shape) - 2)
    mean, variance = (op.Reshape(each, [-1, *deeper]) for each in (mean, variance))
    y = op.Div(op.Sub(x, mean), op.Sqrt(op.Add(variance, cast(eps, out.dtype))))
    for factor, combine in ((weight, op.Mul), (bias, op.Add)):
        y = y if factor is None else combine(y, op.Reshape(factor, [-1, *deeper]))
    return y


def _batch_norm_parts(out: Any, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Any:
    """With the statistics of the batch, which are empty outside of training."""
    y = _batch_norm(out[0], x, weight, bias, mean, variance, False, *rest)
    return y, *(op.Expand(cast(0.0, each.dtype), [0]) for each in out[1:])


def _baddbmm(out: TensorInfo, x: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = op.MatMul(left, right)
    product = product if alpha == 1 else op.Mul(product, cast(alpha, out.dtype))
    return product if beta == 0 else op.Add(product, x if beta == 1 else op.Mul(x, cast(beta, out.dtype)))


def _pair(name: str) -> Translation:
    return lambda out, x: getattr(op, name)(x, None, keepdims=0)


def _size_of_all(_: Any, x: Any) -> Any:
    sizes = [size_of(x, axis) for axis in range(len(x.shape))]
    return op.Size(x) if any(isinstance(size, ir.Value) for size in sizes) else torch.Size(sizes).numel()


def _nan_to_num(
    out: TensorInfo, x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Any:
    limits = torch.finfo(out.dtype)
    numbers = op.Where(op.Equal(x, x), x, cast(nan or 0.0, out.dtype))
    for infinite, given in ((float("inf"), posinf), (float("-inf"), neginf)):
        value = given if given is not None else limits.max if infinite > 0 else limits.min
        numbers = op.Where(op.Equal(numbers, cast(infinite, out.dtype)), cast(value, out.dtype), numbers)
    return numbers


def table() -> dict[Any, Translation]:
    """Operator overload -> translation."""
    return {
        aten.topk.default: _topk,
        aten.sort.default: _sort,
        aten.sort.stable: _sort_stable,
        aten.max.dim: _extreme("ReduceMax", "ArgMax"),
        aten.min.dim: _extreme("ReduceMin", "ArgMin"),
        aten.max.default: _pair("ReduceMax"),
        aten.min.default: _pair("ReduceMin"),
        aten.one_hot.default: _one_hot,
        aten.scatter.src: _scatter,
        aten.scatter.value: _scatter,
        aten.scatter_add.default: _scatter_add,
        aten.index_add.default: _index_add,
        aten.bucketize.Tensor: _bucketize,
        aten.all.default: _all,
        aten.all.dim: _all,
        aten.softplus.default: _softplus,
        aten.einsum.default: _einsum,
        aten.group_norm.default: _group_norm,
        aten.batch_norm.default: _batch_norm,
        aten._native_batch_norm_legit_no_training.default: _batch_norm_parts,
        aten.baddbmm.default: _baddbmm,
        aten.sign.default: lambda _, x: op.Sign(x),
        aten.log1p.default: lambda out, x: op.Log(op.Add(x, cast(1.0, out.dtype))),
        aten.expm1.default: lambda out, x: op.Sub(op.Exp(x), cast(1.0, out.dtype)),
        aten.leaky_relu.default: lambda out, x, slope=0.01: op.Where(
            op.Greater(x, cast(0.0, out.dtype)), x, op.Mul(x, cast(slope, out.dtype))
        ),
        aten.relu6.default: lambda out, x: op.Min(op.Max(x, cast(0.0, out.dtype)), cast(6.0, out.dtype)),
        aten.nan_to_num.default: _nan_to_num,
        aten.sym_numel.default: _size_of_all,
    }
