"""Cases for the Triton kernel of all fused quantizers in the interpreter; test_triton_interpreter.py runs this file."""

from __future__ import annotations

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from kernels.epilogues import CHANGES, epilogue_of
from torch import Tensor

from qpcompile.kernels.activation_quantize.reference import FUNCTIONS, activation
from qpcompile.kernels.layernorm_quantize.reference import layernorm
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.rmsnorm_quantize.reference import rmsnorm
from qpcompile.kernels.transform_quantize.reference import Epilogue
from qpcompile.kernels.transform_quantize.triton import Rows, rows_quantize, rows_stored

EPS = 1e-5
KINDS = ("plain", "rmsnorm", "layernorm", "silu", "gated silu", "gelu", "gelu_tanh", "gelu_sigmoid")
# (tokens, channels, group size): none, odd widths, groups, an odd factor, a tile of several axes.
SIZES = [(1, 63, 0), (17, 96, 0), (5, 96, 32)]
MORE = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((0, 96, 0), (3, 344, 0), (3, 1280, 0))]
WIDE = [("rmsnorm", 4096), ("rmsnorm", 18944), ("gated silu", 11008), ("gated silu", 18944)]


def rows_of(kind: str, tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple[Rows, Tensor]:
    """Random rows whose first one is zero, and the reference's values: f32[tokens, channels]."""
    x, up = (torch.randn(2, tokens, channels) * 5).to(dtype)
    weight, bias = torch.randn(2, channels).to(dtype)
    x[:1] = 0
    if kind == "plain":
        return Rows("plain", x), x.float()
    if kind == "rmsnorm":
        return Rows("rmsnorm", x, weight=weight, eps=EPS), rmsnorm(x, weight, EPS)
    if kind == "layernorm":
        return Rows("layernorm", x, weight=weight, bias=bias, eps=EPS), layernorm(x, weight, bias, EPS)
    gate = up if kind.startswith("gated") else None
    function = kind.removeprefix("gated ")
    return Rows(function, x, gate), activation(x, gate, function)


def check(rows: Rows, values: Tensor, end: Epilogue) -> None:
    values = end.transformed(values)
    expected = quantize_dynamic(values, end.group_size, end.clip_ratio, end.bits)
    assert_codes_agree(rows_quantize(rows, end), expected, values)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "channels", "group_size"), SIZES + MORE)
def test_codes_are_the_references(tokens: int, channels: int, group_size: int, kind: str, change: str) -> None:
    scaled = tokens % 2 == 1
    check(
        *rows_of(kind, tokens, channels),
        epilogue_of(channels, change, scaled=scaled, shifted=channels != 344, group_size=group_size),
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("group_size", [0, 32])
def test_codes_of_8_bits(group_size: int, change: str) -> None:
    check(*rows_of("rmsnorm", 5, 96), epilogue_of(96, change, group_size=group_size, bits=8))


def test_views_of_one_product() -> None:
    """Gate and up as a merged linear leaves them."""
    gate, up = (torch.randn(3, 5, 2 * 96) * 5).split(96, dim=-1)
    check(Rows("silu", gate, up), activation(gate, up, "silu"), epilogue_of(96, "rotated", shifted=True))
    check(Rows("plain", up[:, ::2]), up[:, ::2], epilogue_of(96, "none"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "layernorm", "gated silu"])
def test_half_types(kind: str, dtype: torch.dtype) -> None:
    check(*rows_of(kind, 5, 96, dtype), epilogue_of(96, "factors", scaled=True, shifted=True))


@pytest.mark.parametrize("change", ["rotated", "factors"])
@pytest.mark.parametrize(("kind", "channels"), WIDE)
def test_widths_of_models(kind: str, channels: int, change: str) -> None:
    check(*rows_of(kind, 2, channels), epilogue_of(channels, change, shifted=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(0, 96), (1, 63), (17, 96), (2, 11008)])
def test_activations_are_stored(tokens: int, channels: int, dtype: torch.dtype) -> None:
    """qpcompile::activation: in the type of its operand, which may be a view."""
    for kind in ("silu", "gated silu", "gated gelu", "gelu_sigmoid"):
        rows, values = rows_of(kind, tokens, channels, dtype)
        found = rows_stored(rows)
        assert found.dtype == dtype
        torch.testing.assert_close(found, values.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    gate, up = (torch.randn(3, 5, 2 * 96) * 5).to(dtype).split(96, dim=-1)
    expected = activation(gate, up, "silu").to(dtype)
    torch.testing.assert_close(
        rows_stored(Rows("silu", gate, up)), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_far_ends_of_activations() -> None:
    x = torch.tensor([[-1e4, -100.0, -5.0, -1.0, 0.0, 1.0, 5.0, 100.0, 1e4]])
    up = torch.tensor([[1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 1.0, 0.06, 0.0007]])
    for function in FUNCTIONS:
        check(Rows(function, x, up), activation(x, up, function), Epilogue())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_token_stays_alone(kind: str, change: str) -> None:
    rows, _ = rows_of(kind, 18, 63)
    rows.x[0] = 1
    rows.x[1, 2] = torch.nan
    found = rows_quantize(rows, epilogue_of(63, change))[1]
    assert found.isnan().flatten().nonzero().flatten().tolist() == [1]


def test_a_constant_token_is_its_bias() -> None:
    bias = torch.arange(7.0)[None]
    rows = Rows("layernorm", torch.full((3, 7), 5.0), weight=torch.ones(7), bias=bias[0], eps=EPS)
    q, scale = rows_quantize(rows, Epilogue())
    assert torch.equal(q * scale, (bias / (6 / 7)).round() * (6 / 7) * torch.ones(3, 1))


def test_strided() -> None:
    x, weight = torch.randn(96, 5, 2).transpose(0, 2), torch.randn(192)[::2]
    check(Rows("rmsnorm", x, weight=weight, eps=EPS), rmsnorm(x, weight, EPS), epilogue_of(96, "rotated"))
