"""Types and sizes of values during translation to ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


HALF = (torch.bfloat16, torch.float16)
# Of complex numbers the two parts are a last axis more: f32[..., 2].
COMPLEX = torch.complex64


class _Types(dict[torch.dtype, ir.DataType]):
    @property
    def inverse(self) -> dict[Any, torch.dtype]:
        return {value: key for key, value in self.items() if key not in (*HALF, COMPLEX)}


# Half precision becomes float32: onnxruntime's CPU has few kernels for float16 and none for bfloat16.
onnx_type = _Types(
    {
        torch.float32: ir.DataType.FLOAT,
        torch.float16: ir.DataType.FLOAT,
        torch.bfloat16: ir.DataType.FLOAT,
        COMPLEX: ir.DataType.FLOAT,
        torch.float64: ir.DataType.DOUBLE,
        torch.int64: ir.DataType.INT64,
        torch.int32: ir.DataType.INT32,
        torch.int8: ir.DataType.INT8,
        torch.uint8: ir.DataType.UINT8,
        torch.bool: ir.DataType.BOOL,
    }
)


@dataclass(frozen=True)
class TensorInfo:
    """Static knowledge about a tensor: its type, and its sizes in two runs on inputs of different sizes."""

    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The sizes, None if dynamic."""
        return tuple(first if first == second else None for first, second in self.sizes)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value`, a tensor or a number, in the given type."""
    if not isinstance(value, ir.Value):
        wide = (
            float(value)
            if dtype.is_floating_point or dtype == COMPLEX
            else bool(value)
            if dtype == torch.bool
            else int(value)
        )
        return op.Constant(value=ir.tensor(wide, dtype=onnx_type[dtype]))
    return value if value.dtype == onnx_type[dtype] else op.Cast(value, to=onnx_type[dtype])
