"""The operators in C are the reference on every instruction set of this machine: bit for bit where they compute in
integers or in float64, and but for codes next to a tie where they sum in float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernels.epilogues import CHANGES, arguments_of, epilogue_of
from torch import Tensor

from qpcompile.kernels.activation_quantize import cpu as activation_cpu
from qpcompile.kernels.activation_quantize import reference as activations
from qpcompile.kernels.attention_kv import cpu as attention_cpu
from qpcompile.kernels.attention_kv import reference as attention
from qpcompile.kernels.hadamard import cpu as hadamard_cpu
from qpcompile.kernels.hadamard import reference as hadamard
from qpcompile.kernels.kronecker import cpu as kronecker_cpu
from qpcompile.kernels.kronecker import reference as kronecker
from qpcompile.kernels.kv_write import cpu as write_cpu
from qpcompile.kernels.kv_write import reference as write
from qpcompile.kernels.layernorm_quantize import cpu as layernorm_cpu
from qpcompile.kernels.layernorm_quantize import reference as layernorm
from qpcompile.kernels.linear_int import cpu as linear_cpu
from qpcompile.kernels.linear_int import reference as linear
from qpcompile.kernels.linear_int.packing import pack_int4, unpack_int4
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.quantize_dynamic import cpu as quantize_cpu
from qpcompile.kernels.quantize_dynamic import reference as quantize
from qpcompile.kernels.rmsnorm_quantize import cpu as rmsnorm_cpu
from qpcompile.kernels.rmsnorm_quantize import reference as rmsnorm
from qpcompile.kernels.rope import cpu as rope_cpu
from qpcompile.kernels.rope import reference as rope
from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize import cpu as transform_cpu
from qpcompile.kernels.transform_quantize.reference import Epilogue

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled"),
    pytest.mark.usefixtures("poison"),
]
LEVELS = range(native.library().level + 1)
ROWS = [(0, 64, 0), (1, 63, 0), (17, 144, 36), (40, 33, 3), (3, 1024, 0), (2, 2816, 128), (2, 1, 0)]
LINEARS = [(1, 3), (33, 7), (96, 40), (256, 65), (512, 5), (2816, 33)]
NEAR = 1e-4
"""How near to a tie, in steps, codes may differ where sums are in float32."""
FEW, MANY = (0, 1, 2, 5, 15, 16, 17), (1, 15, 16, 17, 33, 70)
# (batch, query heads, key heads, queries, keys, head size)
CACHES = [(1, 1, 1, 1, 1, 1), (2, 6, 2, 1, 63, 33), (1, 4, 4, 2, 17, 7), (2, 6, 2, 2, 66, 16), (1, 4, 1, 1, 257, 64)]
# Prompts, with more query rows than keys are unpacked for one by one.
CACHES += [
    (1, 2, 2, 9, 9, 7),
    (2, 6, 2, 33, 66, 16),
    (1, 3, 1, 50, 131, 33),
    (1, 1, 1, 40, 40, 64),
    (2, 2, 1, 17, 5, 1),
]
levels = pytest.mark.parametrize("level", LEVELS, ids=[native.LEVELS[level] for level in LEVELS])
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets torch's number for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def codes(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8)


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], values: Tensor, dtype: torch.dtype) -> None:
    """Summed in float64: the same bits. In float32, values: f32[..., C]: the same codes but for one next to a tie."""
    if dtype == torch.float64:
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        return
    # Sums in float32, whose error a rotation moves into groups that are small relative to their row.
    torch.testing.assert_close(found[1], expected[1], rtol=NEAR / 10, atol=0)
    steps = values.double().unflatten(-1, (expected[1].shape[-1], -1)) / expected[1].double().unsqueeze(-1)
    near = ((steps - steps.floor() - 0.5).abs() < NEAR).reshape(values.shape)
    assert ((found[0].int() - expected[0].int()).abs() <= near).all()


@levels
@every
@pytest.mark.parametrize(("tokens", "channels", "group_size"), ROWS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_the_reference(
    tokens: int, channels: int, group_size: int, change: str, scaled: bool, dtype: torch.dtype, level: int
) -> None:
    torch.manual_seed(tokens + channels)
    x, up = (torch.randn(2, tokens, channels) * 5).to(dtype)
    x[:1] = 0
    weight, bias = torch.randn(2, channels).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    end = epilogue_of(channels, change, scaled=scaled, shifted=scaled, group_size=group_size)
    rest = arguments_of(end)

    def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], values: Tensor) -> None:
        agree(found, expected, end.transformed(values, wide_type(x)), dtype)

    found = transform_cpu._native(x, end, level=level)
    check(found, end.quantized(x.float(), wide_type(x)), x.float())
    found = rmsnorm_cpu._native(x, weight, 1e-5, end, level=level)
    check(found, rmsnorm.rmsnorm_quantize(x, weight, 1e-5, *rest), rmsnorm.rmsnorm(x, weight, 1e-5))
    found = layernorm_cpu._native(x, weight, bias, 1e-5, end, level=level)
    expected = layernorm.layernorm_quantize(x, weight, bias, 1e-5, *rest)
    check(found, expected, layernorm.layernorm(x, weight, bias, 1e-5))
    for function, gate in ((function, gate) for function in activations.FUNCTIONS for gate in (None, up)):
        found = activation_cpu._native(x, gate, function, end, level=level)
        expected = activations.activation_quantize(x, gate, function, *rest)
        check(found, expected, activations.activation(x, gate, function))


@levels
@every
@pytest.mark.parametrize(("tokens", "channels", "group_size"), ROWS)
def test_quantizer_and_rotations_are_the_reference(
    tokens: int, channels: int, group_size: int, dtype: torch.dtype, level: int
) -> None:
    torch.manual_seed(tokens + channels)
    x, scale = torch.randn(tokens, channels).to(dtype), torch.rand(channels) + 0.5
    for bits in (4, 8):
        found = quantize_cpu._native(x, group_size, 0.9, bits, level)
        expected = quantize.quantize_dynamic(x, group_size, 0.9, bits)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    left, right = (each + 0.1 * torch.randn_like(each) for each in hadamard.factors(channels))
    pairs = [
        (hadamard_cpu._native(x, scale, level), hadamard.hadamard(x, scale)),
        (kronecker_cpu._native(x, None, left, right, level), kronecker.kronecker(x, None, left, right)),
    ]
    for made, wanted in pairs:
        assert made.dtype == wanted.dtype == dtype
        if dtype == torch.float64:
            assert torch.equal(made, wanted)
        else:
            # The last bits of float32 sums, or the last bit of bfloat16.
            rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.01, 1e-4)
            torch.testing.assert_close(made, wanted, rtol=rtol, atol=atol)


@pytest.mark.skipif(not native.library().amx, reason="this processor has no AMX tiles")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (16, 32), (24, 32), (17, 33), (44, 64), (48, 64), (70, 5)], ids=str)
def test_changes_on_tiles_are_those_of_rows(
    sizes: tuple[int, int], scaled: bool, two_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(sum(sizes))
    channels = sizes[0] * sizes[1]
    x, scale = torch.randn(70, channels).bfloat16(), torch.rand(channels) + 0.5 if scaled else None
    factors = tuple(torch.linalg.qr(torch.randn(size, size))[0] + 0.05 * torch.randn(size, size) for size in sizes)
    x[3, 0] = torch.nan
    kept = torch.arange(70) != 3
    made: dict[str, Any] = {"scale": scale, "factors": factors, "shift": torch.randn(channels)}
    tiles, rows = (RowPlan("plain", torch.bfloat16, channels, **made, level=level) for level in (None, LEVELS[-1]))
    found, expected = tiles.quantized(x), rows.quantized(x)
    assert found[1][3].isnan() and found[1][kept].isfinite().all()
    torch.testing.assert_close(found[1][kept], expected[1][kept], rtol=1e-4, atol=0)
    differences = (found[0][kept].int() - expected[0][kept].int()).abs()
    assert differences.max() <= 1 and differences.float().mean() < 2e-4
    two_threads(2)
    for part in (x, x[:1], x[40:41]):
        again = tiles.quantized(part)
        first = 40 if part.data_ptr() != x.data_ptr() else 0
        assert torch.equal(again[0], found[0][first : first + len(part)])
    torch.testing.assert_close(tiles.stored(x[4:]), rows.stored(x[4:]), rtol=0.01, atol=1e-4)


@levels
@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize(("columns", "features"), LINEARS)
def test_linears_are_the_reference(columns: int, features: int, groups: tuple[int, int], level: int) -> None:
    if columns % max(groups):
        pytest.skip("the groups do not divide the channels")
    torch.manual_seed(columns)
    plain = codes(features, columns)
    weight, weight_scale, bias = pack_int4(plain), torch.rand(features, groups[1]), torch.randn(features)
    assert torch.equal(linear_cpu.native_codes(weight, columns, level), plain)
    for tokens in FEW:
        q, scale = codes(tokens, columns), torch.rand(tokens, groups[0])
        for term, dtype in ((None, torch.float32), (bias.bfloat16(), torch.bfloat16), (bias, torch.float16)):
            found = linear_cpu._in_c(q, scale, weight, weight_scale, term, dtype, level)
            assert torch.equal(found, linear.linear_int(q, scale, weight, weight_scale, term, dtype))


@levels
@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize(("columns", "features"), LINEARS)
def test_packed_linears_on_many_tokens_are_the_reference(
    columns: int, features: int, groups: tuple[int, int], level: int
) -> None:
    if columns % max(groups):
        pytest.skip("the groups do not divide the channels")
    torch.manual_seed(columns)
    weight, bias = pack_int4(codes(features, columns)), torch.randn(features)
    weight_scale = torch.rand(features, groups[1])
    for tokens in (9, 48, 51):
        q, scale = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8), torch.rand(tokens, groups[0])
        for term, dtype in ((None, torch.float32), (bias, torch.bfloat16)):
            found = linear_cpu._in_c(q, scale, weight, weight_scale, term, dtype, level)
            assert torch.equal(found, linear.linear_int(q, scale, weight, weight_scale, term, dtype))


@levels
@pytest.mark.parametrize("tokens", [1, 8, 9, 50])
@pytest.mark.parametrize(("left", "right"), [(-128, -8), (-128, 7), (127, 7), (127, -8)])
def test_packed_linears_do_not_overflow(left: int, right: int, tokens: int, level: int) -> None:
    q, weight = torch.full((tokens, 4096), left, dtype=torch.int8), torch.full((33, 4096), right, dtype=torch.int8)
    ones = torch.ones(tokens, 1), pack_int4(weight), torch.ones(33, 1)
    found = linear_cpu._in_c(q, *ones, None, torch.float32, level)
    assert torch.equal(found, torch.full((tokens, 33), float(left * right * 4096)))


@pytest.mark.parametrize(("columns", "features"), LINEARS)
def test_linears_on_many_tokens_are_the_reference(columns: int, features: int) -> None:
    torch.manual_seed(columns)
    weight, weight_scale, bias = pack_int4(codes(features, columns)), torch.rand(features, 1), torch.randn(features)
    roads = [lambda *rest: linear_cpu._from_codes(rest[0], rest[1], unpack_int4(rest[2], columns), *rest[3:])]
    roads += [linear_cpu._on_tiles] if native.library().amx else []
    for tokens in MANY:
        q, scale = codes(tokens, columns), torch.rand(tokens, 1)
        for term, dtype in ((None, torch.float32), (bias.bfloat16(), torch.bfloat16), (bias, torch.float16)):
            expected = linear.linear_int(q, scale, weight, weight_scale, term, dtype)
            for road in roads:
                assert torch.equal(road(q, scale, weight, weight_scale, term, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 33, 70])
@pytest.mark.parametrize(("columns", "features"), [(96, 40), (512, 64), (300, 32)])
def test_residuals_are_added_to_what_is_rounded(columns: int, features: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    operands = codes(tokens, columns), torch.rand(tokens, 1), pack_int4(codes(features, columns))
    rest = torch.rand(features, 1), torch.randn(features).to(dtype)
    x = 100 * torch.randn(tokens, 2 * features).to(dtype)[:, ::2]
    for bias in (None, rest[1]):
        expected = linear.linear_int(*operands, rest[0], bias, dtype) + x
        assert torch.equal(linear_cpu.linear_int(*operands, rest[0], bias, dtype, 8, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1536, 1537])
def test_linears_whose_results_go_past_the_caches(
    features: int, dtype: torch.dtype, two_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(features)
    q, scale, weight = codes(1100, 256), torch.rand(1100, 1), pack_int4(codes(features, 256))
    weight_scale, x = torch.rand(features, 1), torch.randn(1100, features).to(dtype)
    expected = linear.linear_int(q, scale, weight, weight_scale, None, dtype)
    for threads in (1, 2):
        two_threads(threads)
        assert torch.equal(linear_cpu.linear_int(q, scale, weight, weight_scale, None, dtype, 8), expected)
        assert torch.equal(linear_cpu.linear_int(q, scale, weight, weight_scale, None, dtype, 8, x), expected + x)


@levels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.83])
def test_quotients_at_ties_round_as_divisions_do(clip: float, bits: int, level: int) -> None:
    torch.manual_seed(0)
    largest = torch.rand(400, 1) * 10 ** torch.randint(-30, 30, (400, 1)).float()
    step = largest * clip / quantize.highest(bits)
    # Halves of the step, and the numbers on both sides of them.
    ties = step * (torch.arange(-17, 15) + 0.5 if bits == 4 else torch.arange(-155, 155) + 0.5)
    near = torch.cat(
        [ties, *(torch.nextafter(ties, torch.full_like(ties, side)) for side in (-torch.inf, torch.inf))], 1
    )
    x = torch.cat([largest, torch.where(near.abs() > largest, 0.0, near)], 1)
    x = torch.cat([x, torch.full((1, x.shape[1]), 1e-42), torch.full((1, x.shape[1]), 3e38)])
    found, expected = quantize_cpu._native(x, 0, clip, bits, level), quantize.quantize_dynamic(x, 0, clip, bits)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.skipif(not native.library().amx, reason="this processor has no AMX tiles")
def test_tiles_leave_those_of_others_alone() -> None:
    # oneDNN multiplies bfloat16 and int8 on the same tiles.
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    q, weight, scale = codes(64, 256), pack_int4(codes(96, 256)), torch.ones(64, 1)
    before, ours = x @ w.T, linear_cpu._on_tiles(q, scale, weight, torch.ones(96, 1), None, torch.float32)
    for _ in range(3):
        assert torch.equal(x @ w.T, before)
        assert torch.equal(linear_cpu._on_tiles(q, scale, weight, torch.ones(96, 1), None, torch.float32), ours)
        assert torch.equal(linear_cpu.integer_product(q, unpack_int4(weight, 256)).float(), ours)


@levels
@every
@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 4), (8, 8), (8, 4), (4, 8)])
@pytest.mark.parametrize("case", CACHES, ids=str)
def test_cache_and_attention_are_the_reference(
    case: tuple[int, ...], k_bits: int, v_bits: int, dtype: torch.dtype, level: int
) -> None:
    batch, heads, groups, rows, keys, size = case
    torch.manual_seed(keys)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    k, v = torch.randn(2, batch, keys, groups, size).to(narrow).transpose(2, 3)
    cache = (*write_cpu._native(k, k_bits, level), *write_cpu._native(v, v_bits, level))
    expected = (*write.kv_write(k, k_bits), *write.kv_write(v, v_bits))
    assert all(torch.equal(made, wanted) for made, wanted in zip(cache, expected, strict=True))
    q = torch.randn(batch, rows, heads, size).to(dtype).transpose(1, 2)
    allowed = torch.rand(batch, 1, rows, keys) < 0.7
    allowed[0, :, 0] = False
    causal = torch.arange(keys) <= torch.arange(rows)[:, None] + max(keys - rows, 0)
    masks = [
        None,
        causal[None, None],
        allowed,
        torch.where(allowed, 0.0, -torch.inf).to(narrow),
        torch.randn(batch, heads, rows, keys),
    ]
    for mask in masks:
        found = attention_cpu._native(q, *cache, mask, 0.3, k_bits, v_bits, level)
        wanted = attention.attention_kv(q, *cache, mask, 0.3, k_bits, v_bits)
        assert found.dtype == dtype
        if dtype == torch.float64:
            assert torch.equal(found.float(), wanted.float())
        else:
            rtol, atol = (1e-4, 2e-6) if dtype == torch.float32 else (0.01, 1e-5)
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
        assert found.transpose(1, 2).is_contiguous()
        # A cache with spare capacity after its tokens is read in place.
        ka, kb, va, vb = (torch.cat([part, part], dim=2)[:, :, :keys] for part in cache)
        assert torch.equal(attention_cpu._native(q, ka, kb, va, vb, mask, 0.3, k_bits, v_bits, level), found)


@levels
@both
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 10), (1, 2, 5, 128), (63, 3, 6)], ids=str)
def test_rope_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, level: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1]).to(dtype).transpose(-3, -2)
    tables = (shape[0], 1, shape[2]) if len(shape) == 3 else (1, 1, *shape[2:])
    for cos, sin in (torch.randn(2, *tables), torch.randn(2, *tables).bfloat16()):
        assert torch.equal(rope_cpu._native(x, cos, sin, level), rope.rope(x, cos, sin))


def test_threads_give_the_same_bits(two_threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 1024), pack_int4(codes(700, 1024))
    cache = torch.randn(1, 4, 600, 64)
    results = []
    for threads in (1, 2):
        two_threads(threads)
        q, scale = rmsnorm_cpu._native(x, x[0], 1e-5, Epilogue(rotate=True))
        many = linear_cpu.linear_int(q, scale, weight, torch.ones(700, 1), None, torch.float32, 8)
        few = linear_cpu.linear_int(q[:4], scale[:4], weight, torch.ones(700, 1), None, torch.float32, 8)
        k, v = write_cpu._native(cache, 8), write_cpu._native(cache, 4)
        y = attention_cpu._native(cache[:, :, :1], *k, *v, None, 0.1, 8, 4)
        results.append((q, scale, many, few, *k, *v, y))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_token_is_the_same_in_every_batch() -> None:
    x = torch.randn(33, 768)
    together = rmsnorm_cpu._native(x, x[0], 1e-5, Epilogue(rotate=True))
    alone = [rmsnorm_cpu._native(each, x[0], 1e-5, Epilogue(rotate=True)) for each in x.split(1)]
    assert torch.equal(together[0], torch.cat([q for q, _ in alone]))


def test_nan_stays_nan() -> None:
    x = torch.randn(2, 64)
    x[0, 5] = torch.nan
    _, scale = quantize_cpu._native(x, 0, 1.0, 4)
    assert scale[0].isnan().all() and scale[1].isfinite().all()
    assert all(write_cpu._native(x.view(1, 1, 2, 64), bits)[1][0, 0, 0, 0].isnan() for bits in (4, 8))


def test_not_contiguous() -> None:
    x, weight = torch.randn(48, 5, 2).transpose(0, 2).double(), torch.randn(96)[::2]
    found = rmsnorm_cpu._native(x, weight, 1e-5, Epilogue())
    expected = rmsnorm.rmsnorm_quantize(x.contiguous(), weight.contiguous(), 1e-5, *arguments_of(Epilogue()))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    q, packed = codes(96, 5).T, pack_int4(codes(14, 96))[::2]
    ones = torch.ones(10, 1)[::2], torch.ones(1, 7).T
    expected = linear.linear_int(q, ones[0], packed, ones[1], None, torch.float32)
    assert torch.equal(linear_cpu._in_c(q, ones[0], packed, ones[1], None, torch.float32), expected)


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "sources_digest", lambda: "other")
    loaded = native._loaded.__wrapped__()
    assert loaded.path is None and "compiled from other sources" in loaded.problem


def test_without_a_library_everything_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: native.Library(None, "none", 0, False, False, {}))
    x, weight = torch.randn(3, 96), torch.randn(96)
    rest = arguments_of(Epilogue(rotate=True))
    found = rmsnorm_cpu.rmsnorm_quantize(x, weight, 1e-5, *rest)
    expected = rmsnorm.rmsnorm_quantize(x, weight, 1e-5, *rest)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
