"""ATen operators in standard ONNX operators: shapes, slices, indices, new tensors and arithmetic on sizes.

The conventions are those of aten.py. A dynamic size is a scalar i64 value, a constant one a Python number.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

from qpcompile.emit.onnx.translate.aten import Translation
from qpcompile.emit.onnx.translate.types import COMPLEX, TensorInfo, cast
from qpcompile.errors import ExportError

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
aten = torch.ops.aten


def _reshape(out: TensorInfo, x: Any, shape: Any) -> Any:
    # What torch works out may be known, so that another size can be worked out.
    sizes = [known if size == -1 and known else size for size, known in zip(shape, out.shape, strict=True)]
    sizes += [2] * (out.dtype == COMPLEX)
    if 0 in out.shape:  # the axis has no entries, where 0 otherwise stands for the size of x
        return op.Reshape(x, sizes, allowzero=1)
    sizes = [0 if axis < len(x.shape) and _same(size, x.shape[axis]) else size for axis, size in enumerate(sizes)]
    varying = [index for index, size in enumerate(sizes) if isinstance(size, ir.Value)]
    if len(varying) == 1 and -1 not in sizes:
        sizes[varying[0]] = -1
    return op.Reshape(x, sizes)


def _same(size: Any, known: Any) -> bool:
    """Whether a size that varies was taken (size_of) from an axis of the same name as `known`, an axis's size."""
    if not isinstance(size, ir.Value) or not isinstance(known, ir.SymbolicDim) or known.value is None:
        return False
    squeezed = size.producer()
    taken = squeezed.inputs[0] if squeezed is not None and squeezed.op_type == "Squeeze" else None
    shape = taken.producer() if taken is not None else None
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is None or shape.inputs[0].shape is None:
        return False
    return shape.inputs[0].shape[shape.attributes["start"].as_int()] == known


def _flatten(out: TensorInfo, x: Any, first: int = 0, last: int = -1) -> Any:
    rank = len(x.shape)
    first, last = first % rank, last % rank
    return op.Reshape(x, [*_sizes(x, 0, first), -1, *_sizes(x, last + 1, rank)])


def _unflatten(out: TensorInfo, x: Any, dim: int, sizes: Sequence[Any]) -> Any:
    rank = len(x.shape)
    dim %= rank
    return _reshape(out, x, [*_sizes(x, 0, dim), *sizes, *_sizes(x, dim + 1, rank)])


def _sizes(x: Any, first: int, last: int) -> list[Any]:
    return [size_of(x, axis) for axis in range(first, last)]


def size_of(x: Any, axis: int) -> Any:
    """The size of an axis: a number if constant, else a scalar i64 value."""
    axis %= len(x.shape)
    known = x.shape[axis]
    return known if isinstance(known, int) else op.Squeeze(op.Shape(x, start=axis, end=axis + 1), [0])


def _transpose(_: TensorInfo, x: Any, first: int, second: int) -> Any:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return op.Transpose(x, perm=order)


def _permute(_: TensorInfo, x: Any, dims: Sequence[int]) -> Any:
    return op.Transpose(x, perm=[dim % len(dims) for dim in dims])


def _unsqueeze(_: TensorInfo, x: Any, dim: int) -> Any:
    return op.Unsqueeze(x, [dim])


def _squeeze(_: TensorInfo, x: Any, dim: int) -> Any:
    return op.Squeeze(x, [dim]) if x.shape[dim] == 1 else x


def _expand(out: TensorInfo, x: Any, sizes: Sequence[Any], **named: Any) -> Any:
    # ONNX broadcasts in both directions, so 1 keeps a size like -1 does in torch.
    before = [None] * (len(sizes) - len(x.shape)) + list(x.shape)
    kept = [size == -1 if isinstance(size, int) else _same(size, own) for size, own in zip(sizes, before, strict=True)]
    return op.Expand(x, [1 if same else size for same, size in zip(kept, sizes, strict=True)])


def _slice_scatter(
    out: TensorInfo, x: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """`x` with `part` in place of a slice."""
    dim %= len(x.shape)
    length = op.Squeeze(op.Shape(x, start=dim, end=dim + 1), [0])
    places = op.Slice(op.Range(0, length, 1), [start or 0], [2**63 - 1 if end is None else end], [0], [step])
    order = [dim, *(axis for axis in range(len(x.shape)) if axis != dim)]
    back = [order.index(axis) for axis in range(len(order))]
    rows, new = op.Transpose(x, perm=order), op.Transpose(cast(part, out.dtype), perm=order)
    return op.Transpose(op.ScatterND(rows, op.Unsqueeze(places, [-1]), new), perm=back)


def _select_scatter(out: TensorInfo, x: Any, part: Any, dim: int, index: Any) -> Any:
    if not isinstance(index, int):
        raise ExportError("a part is written at a place that varies", do="report this family")
    end = None if index == -1 else index + 1
    return _slice_scatter(out, x, op.Unsqueeze(part, [dim]), dim, index, end)


def _flip(_: TensorInfo, x: Any, dims: Sequence[int]) -> Any:
    axes = [dim % len(x.shape) for dim in dims]
    return op.Slice(x, [-1] * len(axes), [-(2**63)] * len(axes), axes, [-1] * len(axes))


def _roll(_: TensorInfo, x: Any, shifts: Any, dims: Any = ()) -> Any:
    if not dims:
        raise ExportError("a tensor is rolled over all axes at once", do="report this family")
    for shift, axis in zip(shifts, dims, strict=True):
        x = op.Concat(op.Slice(x, [-shift], [2**63 - 1], [axis]), op.Slice(x, [0], [-shift], [axis]), axis=axis)
    return x


def _squeeze_all(out: TensorInfo, x: Any, dims: Any = None) -> Any:
    axes = range(len(x.shape)) if dims is None else [dim % len(x.shape) for dim in dims]
    ones = [axis for axis in axes if x.shape[axis] == 1]
    return op.Squeeze(x, ones) if ones else x


def _narrow(_: TensorInfo, x: Any, dim: int, start: Any, length: Any) -> Any:
    end = op.Add(cast(start, torch.int64), cast(length, torch.int64))
    return op.Slice(x, [start], op.Reshape(end, [1]), [dim], [1])


def _triangle(upper: int) -> Translation:
    return lambda out, x, diagonal=0: op.Trilu(x, diagonal, upper=upper)


def _repeat(_: TensorInfo, x: Any, times: Sequence[Any]) -> Any:
    return op.Tile(op.Reshape(x, [*[1] * (len(times) - len(x.shape)), *_sizes(x, 0, len(x.shape))]), list(times))


def _repeat_interleave(out: TensorInfo, x: Any, repeats: int, dim: int, **named: Any) -> Any:
    rank = len(x.shape)
    dim %= rank
    wide = op.Expand(op.Unsqueeze(x, [dim + 1]), [1] * (dim + 1) + [repeats] + [1] * (rank - dim - 1))
    return op.Reshape(wide, [*_sizes(x, 0, dim), -1, *_sizes(x, dim + 1, rank)])


def _slice(_: TensorInfo, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    begin, stop = 0 if start is None else start, 2**63 - 1 if end is None else end
    if (begin, stop, step) == (0, 2**63 - 1, 1):
        return x
    return op.Slice(x, [begin], [stop], [dim], [step])


def _select(_: TensorInfo, x: Any, dim: int, index: Any) -> Any:
    return op.Gather(x, index, axis=dim)


def _cat(out: TensorInfo, parts: Sequence[Any], dim: int = 0) -> Any:
    # torch's cat accepts an empty vector (an empty cache) with tensors of any rank.
    full = [cast(part, out.dtype) for part in parts if list(part.shape) != [0]]
    return op.Concat(*full, axis=dim) if len(full) > 1 else full[0]


def _stack(out: TensorInfo, parts: Sequence[Any], dim: int = 0) -> Any:
    return op.Concat(*(op.Unsqueeze(cast(part, out.dtype), [dim]) for part in parts), axis=dim)


def _split_with_sizes(_: TensorInfo, x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    ends = list(accumulate(sizes))
    return tuple(op.Slice(x, [end - size], [end], [dim], [1]) for size, end in zip(sizes, ends, strict=True))


def _split(_: TensorInfo, x: Any, size: int, dim: int = 0) -> Any:
    return _pieces(x, size, dim)


def _chunk(_: TensorInfo, x: Any, count: int, dim: int = 0) -> Any:
    return _pieces(x, -(-_known(x, dim) // count), dim)


def _pieces(x: Any, size: int, dim: int) -> Any:
    total = _known(x, dim)
    return tuple(op.Slice(x, [at], [min(at + size, total)], [dim], [1]) for at in range(0, total, size))


def _unbind(_: TensorInfo, x: Any, dim: int = 0) -> Any:
    return tuple(op.Gather(x, index, axis=dim) for index in range(_known(x, dim)))


def _known(x: Any, dim: int) -> int:
    size = x.shape[dim]
    if not isinstance(size, int):
        raise ExportError("a tensor is cut into a number of pieces that varies", do="report this family")
    return size


def _gather(_: TensorInfo, x: Any, dim: int, index: Any, **named: Any) -> Any:
    return op.GatherElements(x, index, axis=dim)


def _index_select(_: TensorInfo, x: Any, dim: int, index: Any) -> Any:
    return op.Gather(x, index, axis=dim)


def _index(_: TensorInfo, x: Any, indices: Sequence[Any]) -> Any:
    """x[i], x[:, i], x[i, j, ...], x[:, i, j] or x[i, :, j], with indices that broadcast; of masks only constant ones,
    whose places are known.
    """
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    masks = [index for _, index in given if index.dtype == ir.DataType.BOOL]
    if len(masks) == len(given) == 1 and (mask := masks[0].const_value) is not None:
        first = given[0][0]
        given = [(first + axis, op.Constant(value=ir.tensor(i))) for axis, i in enumerate(mask.numpy().nonzero())]
    elif masks:
        raise ExportError("a tensor is indexed by a mask", do="report this family")
    if len(given) == 1:
        return op.Gather(x, given[0][1], axis=given[0][0])
    deep, rank = [axis for axis, _ in given], len(x.shape)
    first, apart = deep[0], deep[-1] - deep[0] >= len(deep)
    rest = [axis for axis in range(rank) if axis not in deep]
    x = op.Transpose(x, perm=[*deep, *rest]) if [*deep, *rest] != list(range(rank)) else x
    found = op.GatherND(x, place_of([index for _, index in given]))
    if apart or not first:
        return found
    # The axes of the indices stand where the indexed axes stood.
    wide = max(len(index.shape) for _, index in given)
    return op.Transpose(found, perm=[*range(wide, wide + first), *range(wide), *range(wide + first, wide + len(rest))])


def place_of(indices: Sequence[Any]) -> Any:
    """Indices that broadcast, one for each leading axis, as ONNX's i64[..., depth]."""
    wide = [cast(index, torch.int64) for index in indices]
    shape = op.Shape(reduce(lambda left, right: op.Add(left, right), wide))
    return op.Concat(*(op.Unsqueeze(op.Expand(index, shape), [-1]) for index in wide), axis=-1)


def _identity(_: TensorInfo, x: Any, *rest: Any, **named: Any) -> Any:
    return x


def _to(out: TensorInfo, x: Any, *rest: Any, **named: Any) -> Any:
    return cast(x, out.dtype)


def _arange(out: TensorInfo, start: Any, end: Any = None, step: Any = 1, **named: Any) -> Any:
    bounds = (0, start) if end is None else (start, end)
    return op.Range(*(cast(bound, out.dtype) for bound in (*bounds, step)))


def _full(out: TensorInfo, sizes: Sequence[Any], value: Any) -> Any:
    value = cast(value, out.dtype)
    return op.Expand(value, list(sizes)) if len(sizes) else value


def _eye(out: TensorInfo, rows: Any, columns: Any = None, **named: Any) -> Any:
    across = op.Range(0, cast(rows if columns is None else columns, torch.int64), 1)
    return cast(op.Equal(op.Unsqueeze(op.Range(0, cast(rows, torch.int64), 1), [1]), across), out.dtype)


def _filled(value: float) -> Translation:
    return lambda out, sizes, **named: _full(out, sizes, value)


def _new_filled(value: float) -> Translation:
    return lambda out, x, sizes, **named: _full(out, sizes, value)


def _filled_like(value: float) -> Translation:
    return lambda out, x, **named: op.Expand(cast(value, out.dtype), op.Shape(x))


def _pad(out: TensorInfo, x: Any, pads: Sequence[Any], value: float = 0) -> Any:
    axes = [-1 - index for index in range(len(pads) // 2)]
    return op.Pad(x, [*pads[0::2], *pads[1::2]], cast(value, out.dtype), axes)


def _number(name: str) -> Translation:
    """Arithmetic on dynamic sizes."""

    def translate(_: Any, left: Any, right: Any) -> Any:
        # Sizes are non-negative, so truncating division is the floor.
        return getattr(op, _NUMBERS[name])(cast(left, torch.int64), cast(right, torch.int64))

    return translate


_NUMBERS = {"add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "mod": "Mod"}


def _moved(rank: int, source: int, target: int) -> list[int]:
    order = [axis for axis in range(rank) if axis != source % rank]
    order.insert(target % rank, source % rank)
    return order


def table() -> dict[Any, Translation]:
    """Operator overload or Python operator -> translation."""
    copies = (aten.contiguous, aten.clone, aten.detach, aten.detach_, aten.lift_fresh_copy, aten.alias, aten.dropout)
    casts = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
    return {
        **{getattr(operator, name): _number(name) for name in _NUMBERS},
        **{packet.default: _identity for packet in copies},
        **dict.fromkeys(casts, _to),
        operator.getitem: lambda _, values, index: values[index],
        operator.neg: lambda _, number: op.Neg(cast(number, torch.int64)),
        operator.pow: lambda _, base, power: op.Pow(cast(base, torch.int64), cast(power, torch.int64)),
        torch.sym_max: lambda _, a, b: op.Max(cast(a, torch.int64), cast(b, torch.int64)),
        torch.sym_min: lambda _, a, b: op.Min(cast(a, torch.int64), cast(b, torch.int64)),
        aten.sym_size.int: lambda _, x, axis: size_of(x, axis),
        aten.view.default: _reshape,
        aten.reshape.default: _reshape,
        aten._unsafe_view.default: _reshape,
        aten.flatten.using_ints: _flatten,
        aten.unflatten.int: _unflatten,
        aten.transpose.int: _transpose,
        aten.permute.default: _permute,
        aten.t.default: lambda _, x: op.Transpose(x, perm=[1, 0]),
        aten.unsqueeze.default: _unsqueeze,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.default: _squeeze_all,
        aten.squeeze.dims: _squeeze_all,
        aten.slice_scatter.default: _slice_scatter,
        aten.select_scatter.default: _select_scatter,
        aten.copy.default: lambda out, x, source, *rest: op.Expand(cast(source, out.dtype), op.Shape(x)),
        aten.zero.default: _filled_like(0),
        aten.fill.Scalar: lambda out, x, value: op.Expand(cast(value, out.dtype), op.Shape(x)),
        aten.fill.Tensor: lambda out, x, value: op.Expand(cast(value, out.dtype), op.Shape(x)),
        aten.flip.default: _flip,
        aten.roll.default: _roll,
        aten.narrow.default: _narrow,
        aten.tril.default: _triangle(0),
        aten.triu.default: _triangle(1),
        aten.type_as.default: _to,
        aten.expand_as.default: lambda _, x, other: op.Expand(x, op.Shape(other)),
        aten.view_as.default: lambda _, x, other: op.Reshape(x, op.Shape(other)),
        aten.reshape_as.default: lambda _, x, other: op.Reshape(x, op.Shape(other)),
        aten.movedim.int: lambda _, x, source, target: op.Transpose(x, perm=_moved(len(x.shape), source, target)),
        aten.expand.default: _expand,
        aten.repeat.default: _repeat,
        aten.repeat_interleave.self_int: _repeat_interleave,
        aten.slice.Tensor: _slice,
        aten.select.int: _select,
        aten.cat.default: _cat,
        aten.stack.default: _stack,
        aten.split_with_sizes.default: _split_with_sizes,
        aten.split.Tensor: _split,
        aten.chunk.default: _chunk,
        aten.unbind.int: _unbind,
        aten.gather.default: _gather,
        aten.index_select.default: _index_select,
        aten.index.Tensor: _index,
        aten.arange.default: _arange,
        aten.eye.default: _eye,
        aten.eye.m: _eye,
        aten.arange.start: _arange,
        aten.arange.start_step: _arange,
        aten.full.default: lambda out, sizes, value, **named: _full(out, sizes, value),
        aten.scalar_tensor.default: lambda out, value, **named: cast(value, out.dtype),
        aten.ones.default: _filled(1),
        aten.zeros.default: _filled(0),
        aten.new_ones.default: _new_filled(1),
        aten.new_zeros.default: _new_filled(0),
        aten.new_full.default: lambda out, x, sizes, value, **named: _full(out, sizes, value),
        aten.ones_like.default: _filled_like(1),
        aten.zeros_like.default: _filled_like(0),
        aten.full_like.default: lambda out, x, value, **named: op.Expand(cast(value, out.dtype), op.Shape(x)),
        aten.constant_pad_nd.default: _pad,
        aten.pad.default: lambda out, x, pads, mode="constant", value=0, **named: _pad(out, x, pads, value or 0),
    }
