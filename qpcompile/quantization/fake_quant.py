"""Fake quantization of stubbed values: the numerics of the quantized operators, in floating point."""

from __future__ import annotations

import torch

from qpcompile.ir.node_facts import StubFact
from qpcompile.kernels.kv4_read.reference import kv4_read
from qpcompile.kernels.kv4_write.reference import kv4_write
from qpcompile.kernels.kv8_read.reference import kv8_read
from qpcompile.kernels.kv8_write.reference import kv8_write
from qpcompile.kernels.linear_int.packing import codes_of, stored_codes
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.quantization.site_bits import cache_at, inputs_at, weights_at
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement


class StubRounding:
    """`fake_quantize` for one recipe over many samples: constant weights are rounded once and cached.

    The cache is of codes, at home: all rounded weights in 16 bits would be a second copy of the model.
    """

    def __init__(self, scheme: QuantizeScheme, on: Placement) -> None:
        self.scheme, self.on = scheme, on
        # Stored codes, and a scale for each row or group.
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, fact: StubFact) -> torch.Tensor:
        """x: f[...], the value of the stub with this fact."""
        if fact.role != "weight":
            return fake_quantize(x, fact, self.scheme)
        weights = weights_at(fact, self.scheme)
        if weights.bits == 16:
            return x
        if fact.site not in self._weights:
            codes, scale = quantize_dynamic(x, weights.kernel_group, 1.0, weights.bits)
            self._weights[fact.site] = self.on.back((stored_codes(codes, weights.bits), scale))
        stored, scale = self.on.there(self._weights[fact.site])
        return _widened(codes_of(stored, x.shape[1]), scale, x.dtype)


def fake_quantize(x: torch.Tensor, fact: StubFact, scheme: QuantizeScheme) -> torch.Tensor:
    """x: f[...] quantized and dequantized; unchanged if the recipe keeps 16 bits."""
    if fact.role == "activation":
        inputs = inputs_at(fact, scheme)
        if inputs.bits == 16:
            return x
        clip = inputs.clip_ratio if fact.clip is None else fact.clip
        return round_trip(x, inputs.kernel_group, clip, inputs.bits)
    if fact.role == "weight":
        weights = weights_at(fact, scheme)
        return x if weights.bits == 16 else round_trip(x, weights.kernel_group, 1.0, weights.bits)
    cache = cache_at(fact, scheme)
    if cache.bits == 16:
        return x
    if cache.bits == 8:
        return kv8_read(*kv8_write(x), x.dtype)
    codes, affine = kv4_write(x)
    return kv4_read(codes, affine, x.shape[-1], x.dtype)


def round_trip(x: torch.Tensor, group_size: int, clip_ratio: float, bits: int) -> torch.Tensor:
    """x: f[..., C] quantized to codes of `bits` bits and dequantized."""
    return _widened(*quantize_dynamic(x, group_size, clip_ratio, bits), x.dtype)


def _widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return wide.flatten(-2).to(dtype)
