"""Argument marshalling for the C library: 8-byte cells, in which a tensor comes with its element count and type.

Counts and element types are read from the tensors here and nowhere else; kernels/native/checks.inc checks them against
the sizes given by the caller, before any memory access.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.row_stride import row_stride

ELEMENTS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.bool: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.int32: 5,
    torch.float16: 6,
    torch.float64: 7,
    torch.int64: 8,
}
"""The numbers of `enum element` in checks.inc."""
NOTHING, OTHER = -1, 9
Cells = tuple[int | float, ...]


class _LayoutError(Exception):
    """A memory layout that no function reads; never leaves this file."""


@dataclass(frozen=True)
class Kind:
    """How a kind of argument is encoded in cells; `cells` encodes a value, None if the value is a cell already."""

    form: str
    cells: Callable[[Tensor | None], Cells] | None = None


def _span(tensor: Tensor | None) -> Cells:
    """A contiguous tensor: its address, element count and type."""
    if tensor is None:
        return 0, 0, NOTHING
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise _LayoutError(f"has no contiguous layout on the CPU: {list(tensor.shape)} on {tensor.device}")
    return tensor.data_ptr(), tensor.numel(), ELEMENTS.get(tensor.dtype, OTHER)


def _front(tensor: Tensor | None) -> Cells:
    """A tensor of any strides: its count covers all elements from its first one to the end of its storage."""
    if tensor is None:
        return 0, 0, NOTHING
    if not tensor.is_cpu:
        raise _LayoutError(f"is on {tensor.device}, not on the CPU")
    count = int(tensor.untyped_storage().nbytes()) // tensor.itemsize - int(tensor.storage_offset())
    # The offset of an empty tensor may be beyond the end.
    return tensor.data_ptr(), max(count, 0), ELEMENTS.get(tensor.dtype, OTHER)


def _view(tensor: Tensor | None) -> Cells:
    """The same plus the strides of its four axes."""
    if tensor is None:
        return 0, 0, NOTHING, 0, 0, 0, 0
    if tensor.dim() != 4:
        raise _LayoutError(f"has {tensor.dim()} axes, not four")
    return *_front(tensor), *tensor.stride()


def _rows(tensor: Tensor | None) -> Cells:
    """A tensor of rows: its elements, those to the end of its storage, and those from row to row."""
    if tensor is None:
        return 0, 0, NOTHING, 0, 0
    stride = row_stride(tensor)
    if stride is None:
        raise _LayoutError(f"has a memory layout without rows: {list(tensor.shape)}, strides {list(tensor.stride())}")
    address, count, element = _front(tensor)
    return address, tensor.numel(), element, count, stride


SPAN, FRONT, VIEW, ROWS = Kind("qqq", _span), Kind("qqq", _front), Kind("7q", _view), Kind("5q", _rows)
WHOLE, REAL = Kind("q"), Kind("d")
Signature = tuple[tuple[str, Kind], ...]


def _of(kind: Kind, names: str) -> Signature:
    return tuple((name, kind) for name in names.split())


PLAN: Signature = (
    *_of(SPAN, "weight bias transform_scale left right shift tiles gates"),
    *_of(WHOLE, "channels group_size left_size right_size kind element rounded highest"),
    *_of(REAL, "constant clip_ratio"),
)
"""The parameters of a row operator (native/rows.py)."""
SIGNATURES: dict[str, Signature] = {
    "linear_int": (
        *_of(SPAN, "q scale weight weight_scale bias y"),
        *_of(WHOLE, "tokens columns features scale_groups weight_groups"),
    ),
    "expert_linear_int": (
        *_of(SPAN, "q scale weight weight_scale index y"),
        *_of(WHOLE, "tokens rows slots experts columns features scale_groups weight_groups"),
    ),
    "linear_int_amx": (
        *_of(SPAN, "q scale weight weight_scale bias residual y"),
        *_of(WHOLE, "tokens columns features"),
    ),
    "unpack_int4": (*_of(SPAN, "weight codes"), *_of(WHOLE, "features columns")),
    "scale_int32": (*_of(SPAN, "sums scale weight_scale bias y"), *_of(WHOLE, "tokens features")),
    "linear": (*_of(SPAN, "x weight y"), *_of(WHOLE, "tokens columns features")),
    "linear_w8a16": (*_of(SPAN, "x weight weight_scale bias y"), *_of(WHOLE, "tokens columns features")),
    "linear_w4a16": (*_of(SPAN, "x weight weight_scale bias y"), *_of(WHOLE, "tokens columns features groups")),
    "dequantize_int4": (*_of(SPAN, "weight weight_scale dense"), *_of(WHOLE, "features columns groups")),
    "kv_write": (*_of(VIEW, "x"), *_of(SPAN, "codes affine"), *_of(WHOLE, "batch heads tokens size bits")),
    "rope": (*_of(VIEW, "x cos sin"), *_of(SPAN, "y"), *_of(WHOLE, "batch heads tokens size")),
    "rope_kv_write": (
        *(*_of(VIEW, "q k v cos sin"), *_of(SPAN, "y k_codes k_affine v_codes v_affine left right tiles center")),
        *_of(WHOLE, "batch heads groups tokens size left_size right_size k_bits v_bits"),
    ),
    "attention_kv": (
        *(*_of(VIEW, "q"), *_of(FRONT, "k_codes k_affine v_codes v_affine"), *_of(VIEW, "mask"), *_of(SPAN, "y")),
        *(*_of(WHOLE, "batch heads groups rows keys room size k_bits v_bits"), *_of(REAL, "scale")),
    ),
    "attention_amx": (
        *(*_of(VIEW, "q k v mask y"), *_of(WHOLE, "batch heads groups queries keys size"), *_of(REAL, "scale")),
    ),
    "attention_mass_amx": (
        *(*_of(VIEW, "q k mask"), *_of(SPAN, "groups mass")),
        *(*_of(WHOLE, "batch heads key_heads tokens size group_count"), *_of(REAL, "scale")),
    ),
    "change_tiles_amx": (*_of(SPAN, "left right tiles"), *_of(WHOLE, "left_size right_size")),
    "rows": (*(*_of(ROWS, "x second"), *_of(SPAN, "q scale y"), *_of(WHOLE, "rows"), *PLAN),),
    "gates": (*_of(SPAN, "made"), *PLAN),
    "add": _of(SPAN, "x y sum"),
    "append": (*_of(SPAN, "token room"), *_of(WHOLE, "heads size tokens at")),
}
"""The arguments of each function by name, in the order of calls.inc."""


def packed(name: str, arguments: Sequence[object]) -> bytes:
    """The cells of a call.

    Raises KernelError for a tensor whose layout the function does not support, and a number that does not fit a cell.
    """
    cells: list[object] = []
    try:
        for (_, kind), value in zip(SIGNATURES[name], arguments, strict=True):
            if kind.cells is None:
                cells.append(value)
            else:
                cells.extend(kind.cells(value))  # type: ignore[arg-type]
        return _layout(name).pack(*cells)
    except _LayoutError as error:
        argument = _operands(name)[len(cells)]
        raise KernelError(f"qp_{name}: {argument} {error}", where=_where(name)) from None
    except struct.error as error:
        raise KernelError(f"qp_{name}: a size does not fit: {error}", where=_where(name)) from None


def error_of(name: str, cells: bytes, result: int) -> KernelError:
    """The error for a function's negative `result`; see checks.inc."""
    if result > 0:
        return KernelError(f"qp_{name}: there is not enough memory for its buffers", where=_where(name))
    code = -1 - result
    problem, place, needed = code & 0xFF, code >> 8 & 0xFF, code >> 16
    operand = _operands(name)[place]
    given = struct.unpack_from("q", cells, 8 * place)[0]
    # Operands begin with their address; their counts and types are in the cells after it.
    _, count, element = struct.unpack_from("3q", cells.ljust(8 * place + 24, b"\0"), 8 * place)
    types = " or ".join(_element(number) for number in range(OTHER) if needed >> number & 1)
    what = {
        0: f"{operand} has {count} elements, {needed} are needed",
        1: f"{operand} has {count} elements, too few for the sizes: {needed} are needed",
        2: f"{operand} is {_element(element)}, not {types}",
        3: f"{operand} has a memory layout that this function does not support",
        4: f"{operand} is {given}, which does not match the other arguments",
    }[problem]
    do = "give operands with matching types and sizes, as in the operator's reference.py"
    return KernelError(f"qp_{name}: {what}", where=_where(name), do=do)


def _where(name: str) -> str:
    return f"qp_{name} in kernels/native/native.c"


def _element(number: int) -> str:
    known = {place: str(dtype).removeprefix("torch.") for dtype, place in ELEMENTS.items()}
    return known.get(number, "missing" if number == NOTHING else "another type")


@functools.cache
def _layout(name: str) -> struct.Struct:
    return struct.Struct("=" + "".join(kind.form for _, kind in SIGNATURES[name]))


@functools.cache
def _operands(name: str) -> dict[int, str]:
    """The argument that starts at each cell."""
    names, place = {}, 0
    for argument, kind in SIGNATURES[name]:
        names[place] = argument
        place += struct.calcsize(f"={kind.form}") // 8
    return names
