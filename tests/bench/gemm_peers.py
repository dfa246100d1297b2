"""What is timed: our linear layers and alternatives to them, on random data, with several copies of a weight."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gemm_layers import Layer
from gpu_timing import Call, copies_beyond
from torch import Tensor

from qpcompile.kernels.linear_int import triton as linear_int
from qpcompile.kernels.linear_int.packing import packed_width
from qpcompile.kernels.linear_w4a16 import triton as linear_w4a16
from qpcompile.kernels.quantize_dynamic import triton as quantize_dynamic

BASELINE = "bf16 cuBLAS"
GROUP = 128
LEAST_TOKENS_OF_INT_MM = 17


@dataclass(frozen=True)
class Prepared:
    """Calls that differ in their weight, the bytes of one weight with its scales, the type of product, a note."""

    calls: list[Call]
    weight_bytes: int
    kind: str
    note: str = ""


Make = Callable[[Layer, int], Prepared]


class NotHereError(Exception):
    """A peer does not run for this shape or is not installed; the text gives the reason."""


def _copies(size: int) -> range:
    return range(copies_beyond(torch.cuda.get_device_properties(0).L2_cache_size, size))


def _activations(tokens: int, layer: Layer) -> Tensor:
    return torch.randn(tokens, layer.in_features, device="cuda").bfloat16()


def _codes(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, device="cuda")


def _packed(layer: Layer) -> list[Tensor]:
    """Random packed weights u8[N, K/2], together larger than the cache."""
    shape = layer.out_features, packed_width(layer.in_features)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in _copies(shape[0] * shape[1])]


def _scales(count: int) -> Tensor:
    return torch.rand(count, 1, device="cuda") / 64 + 0.01


def ours_w4a4(layer: Layer, tokens: int) -> Prepared:
    """The product alone, from codes."""
    q, scale, weight_scale = _codes(tokens, layer.in_features), _scales(tokens), _scales(layer.out_features)
    calls: list[Call] = [
        lambda weight=weight: linear_int.linear_int(q, scale, weight, weight_scale, None, torch.bfloat16, 4)
        for weight in _packed(layer)
    ]
    return Prepared(calls, layer.out_features * (packed_width(layer.in_features) + 4), "int8")


def ours_w4a4_rounding(layer: Layer, tokens: int) -> Prepared:
    """The product and the rounding of its activations."""
    x, weight_scale = _activations(tokens, layer), _scales(layer.out_features)

    def call(weight: Tensor) -> Tensor:
        q, scale = quantize_dynamic.quantize_dynamic(x, 0, 1.0, 4)
        return linear_int.linear_int(q, scale, weight, weight_scale, None, torch.bfloat16, 4)

    calls: list[Call] = [lambda weight=weight: call(weight) for weight in _packed(layer)]
    return Prepared(calls, layer.out_features * (packed_width(layer.in_features) + 4), "int8")


def ours_w4a16(layer: Layer, tokens: int) -> Prepared:
    """The product with activations in bfloat16."""
    x, weight_scale = _activations(tokens, layer), _scales(layer.out_features)
    calls: list[Call] = [
        lambda weight=weight: linear_w4a16.linear_w4a16(x, weight, weight_scale, None) for weight in _packed(layer)
    ]
    return Prepared(calls, layer.out_features * (packed_width(layer.in_features) + 4), "bf16")


def bf16_cublas(layer: Layer, tokens: int) -> Prepared:
    """What an uncompiled model runs."""
    x, shape = _activations(tokens, layer), (layer.out_features, layer.in_features)
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in _copies(2 * shape[0] * shape[1])]
    calls: list[Call] = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
    return Prepared(calls, 2 * shape[0] * shape[1], "bf16")


def _int_mm(layer: Layer, tokens: int, epilogue: bool) -> Prepared:
    if tokens < LEAST_TOKENS_OF_INT_MM:
        raise NotHereError(f"torch._int_mm takes {LEAST_TOKENS_OF_INT_MM} tokens or more on CUDA")
    q, scale, weight_scale = _codes(tokens, layer.in_features), _scales(tokens), _scales(layer.out_features).T
    shape = layer.out_features, layer.in_features
    weights = [_codes(*shape) for _ in _copies(shape[0] * shape[1])]

    def call(weight: Tensor) -> Tensor:
        y = torch.ops.aten._int_mm.default(q, weight.T)
        return y.float().mul_(scale).mul_(weight_scale).bfloat16() if epilogue else y

    calls: list[Call] = [lambda weight=weight: call(weight) for weight in weights]
    return Prepared(calls, shape[0] * shape[1], "int8")


def int8_cublas(layer: Layer, tokens: int) -> Prepared:
    """The 8-bit integer product alone: int32 sums."""
    return _int_mm(layer, tokens, epilogue=False)


def int8_cublas_scaled(layer: Layer, tokens: int) -> Prepared:
    """The 8-bit integer product, scaled by separate operators."""
    return _int_mm(layer, tokens, epilogue=True)


def fp8_cublas(layer: Layer, tokens: int) -> Prepared:
    """8-bit floats, a scale per token and per output channel."""
    eight = torch.float8_e4m3fn
    x, scale, weight_scale = _activations(tokens, layer).to(eight), _scales(tokens), _scales(layer.out_features).T
    shape = layer.out_features, layer.in_features
    weights = [torch.randn(shape, device="cuda").to(eight) for _ in _copies(shape[0] * shape[1])]
    calls: list[Call] = [
        lambda weight=weight: torch.ops.aten._scaled_mm.default(
            x,
            weight.T,
            scale_a=scale,
            scale_b=weight_scale.contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        for weight in weights
    ]
    return Prepared(calls, shape[0] * (shape[1] + 4), "fp8")


def tinygemm(layer: Layer, tokens: int) -> Prepared:
    """torch's own 4-bit weights with bfloat16 activations, groups of 128."""
    x, groups = _activations(tokens, layer), layer.in_features // GROUP
    affine = torch.rand(groups, layer.out_features, 2, device="cuda").bfloat16()
    weights = [torch.ops.aten._convert_weight_to_int4pack(weight, 8) for weight in _packed(layer)]
    calls: list[Call] = [
        lambda weight=weight: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, affine) for weight in weights
    ]
    return Prepared(calls, layer.out_features * (layer.in_features // 2 + 4 * groups), "bf16")


def gemlite(layer: Layer, tokens: int) -> Prepared:
    """GemLite's 4-bit weights with bfloat16 activations, groups of 128, with its own choice of kernel."""
    if importlib.util.find_spec("gemlite") is None:
        raise NotHereError("gemlite is not installed")
    core: Any = importlib.import_module("gemlite.core")
    x, groups = _activations(tokens, layer), layer.in_features // GROUP

    def make() -> Any:
        kind = core.DType.BF16
        linear = core.GemLiteLinear(
            4,
            group_size=GROUP,
            in_features=layer.in_features,
            out_features=layer.out_features,
            input_dtype=kind,
            output_dtype=kind,
        )
        shape = layer.out_features, layer.in_features
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda")
        scales = torch.rand(layer.out_features, groups, device="cuda").bfloat16()
        linear.pack(codes, scales, torch.full_like(scales, 8), None)
        return linear

    linears = [make() for _ in _copies(layer.out_features * layer.in_features // 2)]
    calls: list[Call] = [lambda linear=linear: linear(x) for linear in linears]
    return Prepared(calls, layer.out_features * (layer.in_features // 2 + 4 * groups), "bf16")


KERNELS: Mapping[str, Make] = {
    "ours W4A4": ours_w4a4,
    "ours W4A4 with rounding": ours_w4a4_rounding,
    "ours W4A16": ours_w4a16,
    BASELINE: bf16_cublas,
    "int8 torch._int_mm": int8_cublas,
    "int8 torch._int_mm scaled": int8_cublas_scaled,
    "fp8 torch._scaled_mm": fp8_cublas,
    "W4A16 _weight_int4pack_mm": tinygemm,
    "W4A16 gemlite": gemlite,
}
