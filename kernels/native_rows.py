"""The row operators in C: rows are made, their basis is changed, then they are quantized or stored, all in one call.

A `RowPlan` holds everything but the rows; it is made once where weights are bound to a graph, and per call elsewhere.
"""

from __future__ import annotations

import functools
from ctypes import Structure, addressof, c_double, c_float, c_int, c_long, c_void_p
from typing import Literal

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import factor_arrays
from qpcompile.kernels.native import ELEMENTS, call, library, pointer
from qpcompile.kernels.quantize_int4.reference import group_count

Kind = Literal["plain", "rmsnorm", "layernorm", "silu_mul", "silu_then_mul", "sigmoid_mul"]
KINDS: tuple[Kind, ...] = ("plain", "rmsnorm", "layernorm", "silu_mul", "silu_then_mul", "sigmoid_mul")
"""In the order of rows_of in native_rows.inc."""
GATES: tuple[Kind, ...] = ("silu_mul", "silu_then_mul", "sigmoid_mul")
"""Those that begin with a function of one number, which is looked up for bfloat16."""


class Plan(Structure):
    """rows_plan of native.c."""

    _fields_ = (
        *((name, c_long) for name in ("channels", "group", "left_size", "right_size")),
        *((name, c_void_p) for name in ("weight", "bias", "scale", "left", "right", "shift", "tiles", "gates")),
        ("constant", c_double),
        ("clip", c_float),
        *((name, c_int) for name in ("kind", "element", "weight_element", "rounded")),
    )


class RowPlan:
    """A row operator on tensors of one type and width, with its weights.

    Args:
        kind: what makes a row; the files `cpu.inc` of the operators say what each is.
        dtype: of the rows, float32 or bfloat16.
        weight, bias: f[C] of a norm.
        constant: the epsilon of a norm, the factor of sigmoid_mul.
        scale: f32[C], multiplied before the change of basis.
        factors: f32[A, A] and f32[c, c] with A c = C, or True for the Hadamard rotation.
        shift: f32[C], subtracted after it.
        as_graph: round as the graph does between operators that are one here (half precision).
    """

    def __init__(
        self,
        kind: Kind,
        dtype: torch.dtype,
        channels: int,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        constant: float = 0.0,
        scale: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | bool = False,
        shift: Tensor | None = None,
        group_size: int = 0,
        clip_ratio: float = 1.0,
        as_graph: bool = False,
        level: int | None = None,
    ) -> None:
        element = ELEMENTS[dtype]
        weight, bias = (None if each is None else each.detach().contiguous() for each in (weight, bias))
        scale, shift = (None if each is None else each.detach().float().contiguous() for each in (scale, shift))
        self.kept = [weight, bias, scale, shift]
        if isinstance(factors, tuple):
            left, right = (each.detach().float().contiguous() for each in factors)
            self.kept += [left, right]
            rotation = left.data_ptr(), right.data_ptr(), len(left), len(right)
        else:
            rotation = _hadamard(channels) if factors else (None, None, 0, 0)
        tiles = _tiles(*rotation) if factors and dtype != torch.float32 and level is None else None
        looked_up = kind in GATES and dtype == torch.bfloat16 and level is None
        gates = _gates(kind, constant, as_graph) if looked_up else None
        self.kept += [tiles, gates]
        pointers = [pointer(each) for each in (weight, bias, scale, shift, tiles, gates)]
        self.plan = Plan(
            *(channels, group_size, *rotation[2:], *pointers[:3], *rotation[:2], *pointers[3:], constant, clip_ratio),
            *(KINDS.index(kind), element, 0 if weight is None else ELEMENTS[weight.dtype], element if as_graph else 0),
        )
        self.channels, self.level, self.address = channels, level, addressof(self.plan)
        self.groups = group_count(channels, group_size) if group_size else 1
        self.name = "rows_f64" if dtype == torch.float32 else "rows_f32"

    def quantized(self, x: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, second: dtype[..., C] -> q: i8[..., C], scale: f32[..., G]."""
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty((*x.shape[:-1], self.groups), dtype=torch.float32)
        self._run(x, second, q.data_ptr(), scale.data_ptr(), None)
        return q, scale

    def stored(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """x, second: dtype[..., C] -> dtype[..., C]."""
        y = torch.empty(x.shape, dtype=x.dtype)
        self._run(x, second, None, None, y.data_ptr())
        return y

    def _run(self, x: Tensor, second: Tensor | None, q: int | None, scale: int | None, y: int | None) -> None:
        x = x.contiguous()
        second = None if second is None else second.contiguous()
        rows = x.numel() // self.channels if x.numel() else 0
        other = None if second is None else second.data_ptr()
        call(self.name, self.address, x.data_ptr(), other, rows, q, scale, y, level=self.level)


@functools.cache
def _hadamard(channels: int) -> tuple[int, int, int, int]:
    """Where the factors of the rotation lie, and their sizes."""
    left, right = factor_arrays(channels)  # cached there, so that they stay where they are
    return left.ctypes.data, right.ctypes.data, len(left), len(right)


@functools.cache
def _gates(kind: Kind, constant: float, as_graph: bool) -> Tensor:
    """f32[65536], what a gate makes of every bfloat16, with the bits of numbers that are not looked up."""
    plan = Plan(kind=KINDS.index(kind), constant=constant, rounded=ELEMENTS[torch.bfloat16] if as_graph else 0)
    gates = torch.empty(2**16)
    call("gates_f32", addressof(plan), gates.data_ptr())
    return gates


def _tiles(left: int | None, right: int | None, left_size: int, right_size: int) -> Tensor | None:
    """The factors at these places as kronecker/amx.inc multiplies by them; None where the processor has no tiles."""
    if not library().amx:
        return None
    rows, depth, columns = -left_size // 16 * -16, -left_size // 32 * -32, -right_size // 32 * -32
    tiles = torch.empty(2 * (rows * depth + columns * columns), dtype=torch.bfloat16)
    call("change_tiles_amx", left, right, left_size, right_size, tiles.data_ptr())
    return tiles
