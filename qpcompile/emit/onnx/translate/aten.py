"""ATen operators in standard ONNX operators: arithmetic, comparisons, reductions and layers.

Every translation takes `out`, the known type and constant sizes of the result, then the operator's own arguments, and
returns the result's value. Operators are computed in the same type as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

from qpcompile.emit.onnx.translate.attention import attention
from qpcompile.emit.onnx.translate.float64 import layer_norm, patch_convolution
from qpcompile.emit.onnx.translate.types import COMPLEX, TensorInfo, cast, onnx_type
from qpcompile.errors import ExportError
from qpcompile.kernels.activation_quantize.onnx import activation, sigmoid

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
aten = torch.ops.aten
Translation = Callable[..., Any]


def _arithmetic(operator: str) -> Translation:
    def translate(out: TensorInfo, left: Any, right: Any, *, alpha: float = 1) -> Any:
        right = cast(right, out.dtype)
        if alpha != 1:
            right = op.Mul(right, cast(alpha, out.dtype))
        return getattr(op, operator)(cast(left, out.dtype), right)

    return translate


def _reversed_sub(out: TensorInfo, left: Any, right: Any, alpha: float = 1) -> Any:
    return _arithmetic("Sub")(out, right, left, alpha=alpha)


def _compare(operator: str) -> Translation:
    def translate(_: TensorInfo, left: Any, right: Any) -> Any:
        dtype = _common(left, right)
        if dtype == torch.bool and operator not in ("Equal",):
            dtype = torch.int32
        return getattr(op, operator)(cast(left, dtype), cast(right, dtype))

    return translate


def _common(left: Any, right: Any) -> torch.dtype:
    """The promoted type in which torch compares two operands, one of which may be a number."""
    types = [onnx_type.inverse[side.dtype] for side in (left, right) if isinstance(side, ir.Value)]
    numbers = [side for side in (left, right) if not isinstance(side, ir.Value)]
    dtype = types[0] if len(types) == 1 else torch.promote_types(types[0], types[1])
    if numbers and isinstance(numbers[0], float) and not dtype.is_floating_point:
        return torch.float32
    return dtype


def _logical(on_bool: str, on_int: str) -> Translation:
    def translate(out: TensorInfo, *args: Any) -> Any:
        return getattr(op, on_bool if out.dtype == torch.bool else on_int)(*(cast(arg, out.dtype) for arg in args))

    return translate


def _unary(operator: str) -> Translation:
    def translate(out: TensorInfo, x: Any) -> Any:
        return getattr(op, operator)(cast(x, out.dtype))

    return translate


def _div_mode(out: TensorInfo, left: Any, right: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return _arithmetic("Div")(out, left, right)
    if out.dtype.is_floating_point:
        quotient = _arithmetic("Div")(out, left, right)
        return op.Floor(quotient) if rounding_mode == "floor" else _truncate(quotient, out.dtype)
    # ONNX integer division truncates; correcting by the remainder with the divisor's sign gives the floor.
    left, right = cast(left, out.dtype), cast(right, out.dtype)
    return op.Div(op.Sub(left, op.Mod(left, right)) if rounding_mode == "floor" else left, right)


def _truncate(x: Any, dtype: torch.dtype) -> Any:
    return op.Mul(cast(op.Sign(x), dtype), op.Floor(op.Abs(x)))


def _remainder(out: TensorInfo, left: Any, right: Any) -> Any:
    left, right = cast(left, out.dtype), cast(right, out.dtype)
    if out.dtype.is_floating_point:
        return op.Sub(left, op.Mul(op.Floor(op.Div(left, right)), right))
    return op.Mod(left, right)


def _pow(out: TensorInfo, base: Any, exponent: Any) -> Any:
    base = cast(base, out.dtype)
    return op.Mul(base, base) if exponent == 2 else op.Pow(base, cast(exponent, out.dtype))


def _rsqrt(out: TensorInfo, x: Any) -> Any:
    return op.Reciprocal(op.Sqrt(cast(x, out.dtype)))


def _sigmoid(out: TensorInfo, x: Any) -> Any:
    return sigmoid(cast(x, out.dtype), ir.DataType.DOUBLE if out.dtype == torch.float64 else ir.DataType.FLOAT)


def _silu(out: TensorInfo, x: Any) -> Any:
    return op.Mul(x, _sigmoid(out, x))


def _gelu(out: TensorInfo, x: Any, *, approximate: str = "none") -> Any:
    if out.dtype == torch.float64:
        return activation(x, "gelu_tanh" if approximate == "tanh" else "gelu", ir.DataType.DOUBLE)
    return op.Gelu(x, approximate=approximate)


def _softmax(out: TensorInfo, x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    return op.Softmax(cast(x, out.dtype), axis=dim)


def _clamp(out: TensorInfo, x: Any, low: Any = None, high: Any = None, **named: Any) -> Any:
    low, high = named.get("min", low), named.get("max", high)
    x = cast(x, out.dtype)
    x = x if low is None else op.Max(x, cast(low, out.dtype))
    return x if high is None else op.Min(x, cast(high, out.dtype))


def _where(out: TensorInfo, condition: Any, left: Any, right: Any) -> Any:
    return op.Where(condition, cast(left, out.dtype), cast(right, out.dtype))


def _masked_fill(out: TensorInfo, x: Any, mask: Any, value: Any) -> Any:
    return op.Where(mask, cast(value, out.dtype), x)


def _reduce(operator: str) -> Translation:
    def translate(out: TensorInfo, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        axes = None if dim in (None, []) else [dim] if isinstance(dim, int) else list(dim)
        return getattr(op, operator)(cast(x, out.dtype), axes, keepdims=int(keepdim))

    return translate


def _any(_: TensorInfo, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return cast(_reduce("ReduceMax")(TensorInfo(torch.int32, ()), x, dim, keepdim), torch.bool)


def _cumsum(out: TensorInfo, x: Any, dim: int, *, dtype: Any = None) -> Any:
    return op.CumSum(cast(x, out.dtype), dim)


def _argmax(_: TensorInfo, x: Any, dim: int, keepdim: bool = False) -> Any:
    return op.ArgMax(x, axis=dim, keepdims=int(keepdim))


def _argmin(_: TensorInfo, x: Any, dim: int, keepdim: bool = False) -> Any:
    return op.ArgMin(x, axis=dim, keepdims=int(keepdim))


def _argsort(_: TensorInfo, x: Any, dim: int = -1, descending: bool = False, **named: Any) -> Any:
    """A stable sort: onnxruntime's TopK breaks ties by the lower index."""
    axis = dim % len(x.shape)
    _, index = op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)
    return index


def _matmul(out: TensorInfo, left: Any, right: Any) -> Any:
    return op.MatMul(left, right)


def _linear(_: TensorInfo, x: Any, weight: Any, bias: Any = None) -> Any:
    """weight: f[N, C]; a constant weight is stored transposed, see `Translator.transposed`."""
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _addmm(out: TensorInfo, bias: Any, left: Any, right: Any) -> Any:
    return op.Add(op.MatMul(left, right), bias)


def _convolution(rank: int) -> Translation:
    def translate(
        out: TensorInfo,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        strides, dilations = (_each(value, rank) for value in (stride, dilation))
        if isinstance(padding, str):  # "valid", or "same" as the input: odd paddings have the larger half at the end
            spread = [
                (size - 1) * gap if padding == "same" else 0
                for size, gap in zip(weight.shape[2:], dilations, strict=True)
            ]
            both = [*(each // 2 for each in spread), *(each - each // 2 for each in spread)]
        else:
            both = [*_each(padding, rank), *_each(padding, rank)]
        if out.dtype == torch.float64:
            return patch_convolution(out, x, weight, bias, strides)
        return op.Conv(x, weight, bias, strides=strides, pads=both, dilations=dilations, group=groups)

    return translate


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _layer_norm(
    out: TensorInfo, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    if out.dtype == torch.float64:
        return layer_norm(x, weight, bias, eps)
    if weight is None:
        weight = op.Expand(cast(1.0, onnx_type.inverse[x.dtype]), list(shape))
    return op.LayerNormalization(x, weight, bias, axis=-len(shape), epsilon=eps)


def _rms_norm(out: TensorInfo, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    axes = list(range(-len(shape), 0))
    mean = op.ReduceMean(op.Mul(x, x), axes, keepdims=1)
    small = torch.finfo(out.dtype).eps if eps is None else eps
    scaled = op.Div(x, op.Sqrt(op.Add(mean, cast(small, out.dtype))))
    return scaled if weight is None else op.Mul(scaled, weight)


def _vector_norm(out: TensorInfo, x: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    if order != 2:
        raise ExportError(f"a norm of order {order} has no translation", do="report this family")
    axes = None if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return op.ReduceL2(cast(x, out.dtype), axes, keepdims=int(keepdim))


def _complex(out: TensorInfo, real: Any, imaginary: Any) -> Any:
    return op.Concat(*(op.Unsqueeze(cast(each, torch.float32), [-1]) for each in (real, imaginary)), axis=-1)


def _polar(out: TensorInfo, length: Any, angle: Any) -> Any:
    return _complex(out, op.Mul(length, op.Cos(angle)), op.Mul(length, op.Sin(angle)))


def _mul(out: TensorInfo, left: Any, right: Any) -> Any:
    """Products; of complex numbers both factors are, or one is a single number."""
    if out.dtype != COMPLEX or not isinstance(right, ir.Value):
        return _arithmetic("Mul")(out, left, right)
    (a, b), (c, d) = ([op.Gather(each, part, axis=-1) for part in (0, 1)] for each in (left, right))
    return _complex(out, op.Sub(op.Mul(a, c), op.Mul(b, d)), op.Add(op.Mul(a, d), op.Mul(b, c)))


def _embedding(_: TensorInfo, weight: Any, ids: Any, *rest: Any) -> Any:
    return op.Gather(weight, ids, axis=0)


def _attention(_: TensorInfo, *args: Any, **named: Any) -> Any:
    return attention(*args, **named)


_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}
_COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_UNARY = {
    "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "exp": "Exp", "log": "Log", "cos": "Cos",
    "sin": "Sin", "tanh": "Tanh", "relu": "Relu", "erf": "Erf", "floor": "Floor",
    "ceil": "Ceil", "round": "Round",
}  # fmt: skip


def _not_equal(out: TensorInfo, left: Any, right: Any) -> Any:
    return op.Not(_compare("Equal")(out, left, right))


def table() -> dict[Any, Translation]:
    """Operator overload -> translation."""
    found: dict[Any, Translation] = {}
    for names, make in ((_BINARY, _arithmetic), (_COMPARISONS, _compare), (_UNARY, _unary)):
        for name, operator in names.items():
            packet = getattr(aten, name)
            for overload in ("Tensor", "Scalar", "default"):
                if overload in packet.overloads():
                    found[getattr(packet, overload)] = make(operator)
    return found | {
        aten.mul.Tensor: _mul,
        aten.polar.default: _polar,
        aten.view_as_complex.default: lambda _, x: op.Identity(x),
        aten.view_as_real.default: lambda _, x: op.Identity(x),
        aten.ne.Tensor: _not_equal,
        aten.ne.Scalar: _not_equal,
        aten.rsub.Scalar: _reversed_sub,
        aten.div.Tensor_mode: _div_mode,
        aten.floor_divide.default: lambda out, a, b: _div_mode(out, a, b, rounding_mode="floor"),
        aten.remainder.Scalar: _remainder,
        aten.remainder.Tensor: _remainder,
        aten.pow.Tensor_Scalar: _pow,
        aten.square.default: lambda out, x: op.Mul(x, x),
        aten.rsqrt.default: _rsqrt,
        aten.sigmoid.default: _sigmoid,
        aten.silu.default: _silu,
        aten.gelu.default: _gelu,
        aten.softmax.int: _softmax,
        aten.clamp.default: _clamp,
        aten.clamp_min.default: lambda out, x, low: _clamp(out, x, low),
        aten.where.self: _where,
        aten.where.ScalarOther: _where,
        aten.where.ScalarSelf: _where,
        aten.where.Scalar: _where,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.bitwise_and.Tensor: _logical("And", "BitwiseAnd"),
        aten.__and__.Tensor: _logical("And", "BitwiseAnd"),
        aten.logical_and.default: _logical("And", "And"),
        aten.bitwise_or.Tensor: _logical("Or", "BitwiseOr"),
        aten.__or__.Tensor: _logical("Or", "BitwiseOr"),
        aten.logical_or.default: _logical("Or", "Or"),
        aten.bitwise_not.default: _logical("Not", "BitwiseNot"),
        aten.logical_not.default: _logical("Not", "Not"),
        aten.sum.default: _reduce("ReduceSum"),
        aten.sum.dim_IntList: _reduce("ReduceSum"),
        aten.mean.dim: _reduce("ReduceMean"),
        aten.mean.default: _reduce("ReduceMean"),
        aten.amax.default: _reduce("ReduceMax"),
        aten.amin.default: _reduce("ReduceMin"),
        aten.any.dim: _any,
        aten.cumsum.default: _cumsum,
        aten.argmax.default: _argmax,
        aten.argmin.default: _argmin,
        aten.argsort.default: _argsort,
        aten.matmul.default: _matmul,
        aten.bmm.default: _matmul,
        aten.mm.default: _matmul,
        aten.addmm.default: _addmm,
        aten.linear.default: _linear,
        aten.conv1d.default: _convolution(1),
        aten.conv2d.default: _convolution(2),
        aten.conv2d.padding: _convolution(2),
        aten.conv3d.default: _convolution(3),
        aten.layer_norm.default: _layer_norm,
        aten.rms_norm.default: _rms_norm,
        aten.linalg_vector_norm.default: _vector_norm,
        aten.norm.ScalarOpt_dim: _vector_norm,
        aten.embedding.default: _embedding,
        aten.scaled_dot_product_attention.default: _attention,
    }
