"""Row operators in C: compute rows (norm or gate), change their basis, quantize or store them, fused in one call.

A `RowPlan` holds all parameters; it is created once when weights are bound to a graph, and per call elsewhere.
"""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import factor_arrays
from qpcompile.kernels.native.cells import ELEMENTS, OTHER
from qpcompile.kernels.native.library import call, library, real
from qpcompile.kernels.quantize_dynamic.reference import group_count, highest
from qpcompile.kernels.row_stride import in_rows

Gate = Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid"]
Kind = Literal["plain", "rmsnorm", "layernorm"] | Gate
GATES: tuple[Gate, ...] = ("silu", "gelu", "gelu_tanh", "gelu_sigmoid")
"""Activation functions, which are table lookups for bfloat16."""
KINDS: tuple[Kind, ...] = ("plain", "rmsnorm", "layernorm", *GATES)
"""In the order of rows_of in rows.inc."""


@dataclass(frozen=True, eq=False)
class RowPlan:
    """A row operator for tensors of one type and width, with its weights.

    kind: how a row is computed; defined in the operators' `cpu.inc`.
    dtype, channels: of the rows; float32, bfloat16, or float64 for rows computed in it.
    weight, bias: f[C] of a norm.
    constant: the epsilon of a norm.
    scale: f32[C], applied before the basis change.
    factors: f32[A, A] and f32[c, c] with A c = C, or True for the Hadamard rotation.
    shift: f32[C], subtracted after it.
    bits: of the codes.
    as_graph: round a norm in half precision before it is multiplied by its weight, as the operator rmsnorm does.
    level: the instruction set, None for the best one.
    arguments: those of the function in C.
    """

    kind: Kind
    dtype: torch.dtype
    channels: int
    _: KW_ONLY
    weight: Tensor | None = None
    bias: Tensor | None = None
    constant: float = 0.0
    scale: Tensor | None = None
    factors: tuple[Tensor, Tensor] | bool = False
    shift: Tensor | None = None
    group_size: int = 0
    clip_ratio: float = 1.0
    bits: int = 4
    as_graph: bool = False
    level: int | None = None
    arguments: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # At once, not in the first call: a step that is being recorded would record how tiles and tables are made.
        object.__setattr__(self, "arguments", self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        """The arguments in C, in the order of PLAN in cells.py."""
        weight, bias = (None if each is None else each.detach().contiguous() for each in (self.weight, self.bias))
        scale, shift = (
            None if each is None else each.detach().float().contiguous() for each in (self.scale, self.shift)
        )
        left, right = _factors(self.channels, self.factors)
        sizes = (0, 0) if left is None or right is None else (len(left), len(right))
        on_tiles = left is not None and self.dtype == torch.bfloat16 and self.level is None
        tiles = _tiles(left, right) if on_tiles else None
        looked_up = self.kind in GATES and self.dtype == torch.bfloat16 and self.level is None
        gates = _gates(self.kind) if looked_up else None
        element = ELEMENTS.get(self.dtype, OTHER)
        rounded = element if self.as_graph else ELEMENTS[torch.float32]
        return (
            *(weight, bias, scale, left, right, shift, tiles, gates),
            *(self.channels, self.group_size, *sizes, KINDS.index(self.kind), element, rounded),
            *(highest(self.bits), self.constant, self.clip_ratio),
        )

    def quantized(self, x: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, second: dtype[..., C] -> q: i8[..., C], scale: f32[..., G]."""
        q = torch.empty(x.shape, dtype=torch.int8)
        groups = group_count(self.channels, self.group_size) if self.group_size else 1
        scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32)
        self._run(x, second, q, scale, None)
        return q, scale

    def stored(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """x, second: dtype[..., C] -> dtype[..., C]."""
        y = torch.empty(x.shape, dtype=x.dtype)
        self._run(x, second, None, None, y)
        return y

    def _run(self, x: Tensor, second: Tensor | None, q: Tensor | None, scale: Tensor | None, y: Tensor | None) -> None:
        second = None if second is None else in_rows(second)
        rows = math.prod(x.shape[:-1])
        call("rows_" + real(x), in_rows(x), second, q, scale, y, rows, *self.arguments, level=self.level)


def _factors(channels: int, given: tuple[Tensor, Tensor] | bool) -> tuple[Tensor | None, Tensor | None]:
    """The factors of a basis change, those of the Hadamard rotation for True."""
    if isinstance(given, tuple):
        left, right = (each.detach().float().contiguous() for each in given)
        return left, right
    if not given:
        return None, None
    left, right = factor_arrays(channels)
    return torch.from_numpy(left), torch.from_numpy(right)


@functools.cache
def rotation(channels: int, on_tiles: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of the Hadamard rotation, and for half precision those on AMX tiles, if the processor has them."""
    with torch.inference_mode(False):
        left, right = _factors(channels, True)
        assert left is not None and right is not None
        return left, right, _tiles(left, right) if on_tiles else None


@functools.cache
def _gates(kind: Kind) -> Tensor:
    """f32[65536], the function tabulated over every bfloat16, bit-identical to the direct computation."""
    gates = torch.empty(2**16)
    sizes = 0, 0, 0, 0, KINDS.index(kind), ELEMENTS[torch.bfloat16], ELEMENTS[torch.float32]
    call("gates_f32", gates, *[None] * 8, *sizes, 0, 0.0, 0.0)
    return gates


def _tiles(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """These factors in the tile layout of kronecker/amx.inc; None if the processor has no AMX tiles."""
    if not library().amx or left is None or right is None:
        return None
    rows, depth, columns = -len(left) // 16 * -16, -len(left) // 32 * -32, -len(right) // 32 * -32
    tiles = torch.empty(2 * (rows * depth + columns * columns), dtype=torch.bfloat16)
    call("change_tiles_amx", left, right, tiles, len(left), len(right))
    return tiles
