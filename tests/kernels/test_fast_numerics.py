"""Float32 rows against the same in float64: the bound between fast and exact numerics that docs/numerics.md states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.epilogues import CHANGES, arguments_of, epilogue_of
from torch import Tensor

from qpcompile.ir.operators import (
    ACTIVATION_QUANTIZE,
    ATTENTION_KV,
    KV_WRITE,
    LAYERNORM_QUANTIZE,
    RMSNORM_QUANTIZE,
    TRANSFORM_QUANTIZE,
)

# Codes that differ, of 10^5, and the relative difference of scales.
MOST, SCALES = 1, 2e-6
Quantizer = Callable[..., tuple[Tensor, Tensor]]


def rmsnorm(x: Tensor, end: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    return RMSNORM_QUANTIZE(x, torch.linspace(0.2, 3, x.shape[-1]), 1e-5, *end)


def layernorm(x: Tensor, end: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    weight = torch.linspace(0.2, 3, x.shape[-1])
    return LAYERNORM_QUANTIZE(x, weight, -weight, 1e-5, *end)


def silu(x: Tensor, end: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    return ACTIVATION_QUANTIZE(x, x.flip(0), "silu", *end)


def gelu(x: Tensor, end: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    return ACTIVATION_QUANTIZE(x, None, "gelu", *end)


def plain(x: Tensor, end: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    return TRANSFORM_QUANTIZE(x, *end)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quantizer", [rmsnorm, layernorm, silu, gelu, plain])
def test_codes_are_within_the_bound(quantizer: Quantizer, change: str) -> None:
    differing = total = 0
    for tokens, channels, group_size in ((300, 144, 36), (130, 1408, 0), (200, 768, 0)):
        torch.manual_seed(channels)
        end = arguments_of(epilogue_of(channels, change, scaled=True, shifted=True, group_size=group_size))
        x = torch.randn(tokens, channels) * torch.logspace(-1, 1, channels)
        (fast, scale), (exact, wanted) = quantizer(x, end), quantizer(x.double(), end)
        assert (fast.int() - exact.int()).abs().max() <= 1
        torch.testing.assert_close(scale, wanted, rtol=SCALES, atol=0)
        differing, total = differing + int((fast != exact).sum()), total + fast.numel()
    assert differing <= MOST * total / 1e5, f"{differing} of {total}"


@pytest.mark.parametrize("rows", [1, 40])
def test_attention_is_within_the_bound(rows: int) -> None:
    torch.manual_seed(rows)
    k, v = torch.randn(2, 2, 2, 300, 48)
    cache = *KV_WRITE(k, 4), *KV_WRITE(v, 4)
    q = torch.randn(2, 6, rows, 48)
    fast, exact = (ATTENTION_KV(each, *cache, None, 0.2, 4, 4) for each in (q, q.double()))
    assert (fast - exact).abs().max() <= 2e-6 * v.abs().max()
