"""Attention over a whole prompt on AMX tiles against the formula, and which calls are dispatched there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.ir.operators import RULES
from qpcompile.kernels.attention import cpu, reference
from qpcompile.kernels.native import library as native
from qpcompile.runtime.cpu.torch_operators import attend

tiles = pytest.mark.skipif(not native.library().amx, reason="this processor has no AMX tiles")
# (batch, query heads, key heads, queries, keys, head size)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 16, 32, 32),
    (2, 4, 2, 17, 33, 80),
    (1, 3, 3, 70, 257, 7),
    (2, 6, 2, 63, 64, 128),
    (1, 2, 2, 33, 31, 65),
    (1, 1, 1, 17, 545, 72),
]


def given(shape: tuple[int, ...]) -> list[Tensor]:
    """Queries, keys and values as projections leave them, [B, S, H, D] in memory."""
    batch, heads, groups, queries, keys, size = shape
    torch.manual_seed(sum(shape))
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    return [torch.randn(batch, *each, size).bfloat16().transpose(1, 2) for each in sizes]


def masks(shape: tuple[int, ...]) -> list[Tensor | None]:
    """No mask, one for all heads with a fully masked query, a separate one for each head."""
    batch, heads, _, queries, keys, _ = shape
    causal = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    causal[:, :, 0] = False
    return [None, causal, torch.rand(batch, heads, queries, keys) < 0.5, torch.ones(1, 1, 1, keys, dtype=torch.bool)]


@tiles
@pytest.mark.parametrize("scale", [0.3, 5.0], ids=["bounded", "large scores"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given(shape)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: plain(*a, **o).fill_(torch.nan))
    for mask in masks(shape):
        expected = reference.attention(q.double(), k.double(), v.double(), mask, scale)
        found = cpu._on_tiles(q, k, v, mask, scale)
        # Probabilities are bfloat16 in the second product, and so is the result.
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7 * float(v.abs().max()))
        assert found.transpose(1, 2).is_contiguous()


@tiles
def test_is_as_near_as_torchs() -> None:
    shape = (1, 4, 4, 300, 300, 64)
    q, k, v = given(shape)
    expected = reference.attention(q.double(), k.double(), v.double(), None, 0.125)
    errors = [
        float((each.double() - expected).norm())
        for each in (cpu._on_tiles(q, k, v, None, 0.125), cpu.fused(q, k, v, None, 0.125))
    ]
    assert errors[0] < 1.2 * errors[1]


@tiles
def test_large_scores_and_nan() -> None:
    q, k, v = given((1, 2, 2, 40, 64, 32))
    found = cpu._on_tiles(q * 100, k, v, None, 1.0)
    torch.testing.assert_close(found, cpu.fused(q * 100, k, v, None, 1.0), rtol=0.02, atol=0.02)
    q[0, 1, 3, 5] = torch.nan
    rows = cpu._on_tiles(q, k, v, None, 1.0).isnan().all(-1)
    assert rows.nonzero().tolist() == [[0, 1, 3]]
    q, k, v = given((1, 2, 2, 40, 64, 32))
    k[0, 0, 9, 5] = torch.nan
    mask = torch.ones(40, 64, dtype=torch.bool)
    mask[:30, 9] = False
    rows = cpu._on_tiles(q, k, v, mask, 1.0).isnan().all(-1)
    assert rows.nonzero().tolist() == [[0, 0, query] for query in range(30, 40)]


@tiles
@pytest.mark.parametrize("factor", [9.0, 10.0, 11.0, 1e4])
def test_scores_around_the_bound(factor: float) -> None:
    # One key opposite to the query and one parallel to it: scores as far apart as |q| |k| allows.
    q = torch.zeros(1, 1, 32, 32).bfloat16()
    q[..., 0] = factor
    k, v = torch.zeros(2, 1, 1, 64, 32).bfloat16()
    k[..., 0] = -4
    k[0, 0, 17, 0], v[0, 0, 17], v[0, 0, 3] = 4, 3, 100
    found = cpu._on_tiles(q, k, v, None, 1.0)
    expected = reference.attention(q.double(), k.double(), v.double(), None, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


@tiles
def test_threads_and_copies_give_the_same_bits() -> None:
    q, k, v = given((2, 6, 2, 100, 130, 64))
    expected = cpu._on_tiles(q, k, v, None, 0.125)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu._on_tiles(q, k, v, None, 0.125), expected)
    finally:
        torch.set_num_threads(before)
    q, k, v = (each.mT.contiguous().mT for each in (q, k, v))
    assert torch.equal(cpu._on_tiles(q, k, v, None, 0.125), expected)


@pytest.mark.parametrize("change", ["float32", "float mask", "few queries", "negative scale", "double"])
def test_the_rest_is_torchs(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given((1, 4, 2, 2 if change == "few queries" else 20, 40, 16))
    mask: Any = torch.zeros(20, 40).bfloat16() if change == "float mask" else None
    if change in ("float32", "double"):
        q, k, v = (each.to(torch.float32 if change == "float32" else torch.float64) for each in (q, k, v))
    scale = -0.3 if change == "negative scale" else 0.3
    monkeypatch.setattr(cpu, "_on_tiles", None)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    assert torch.equal(cpu.attention(q, k, v, mask, scale), expected)


@pytest.mark.parametrize("heads", [(4, 0, 0), (4, 2, 0), (4, 3, 3)])
def test_heads_that_cannot_be_shared_out_are_refused(heads: tuple[int, int, int]) -> None:
    """torch divides by the number of key heads: zero heads would kill the process."""
    q, k, v = (torch.randn(1, count, 3, 8) for count in heads)
    with pytest.raises(KernelError) as error:
        cpu.attention(q, k, v, None, 0.3)
    assert error.value.where in {f"kernels/attention, operand {name}" for name in "qkv"}
    # torch's operator in the forms of graphs: other arguments by name or omitted, any leading sizes.
    rule = RULES[torch.ops.aten.scaled_dot_product_attention.default]
    for tensors in ((q, k, v), (q[0], k[0], v[0]), (q[None], k[None], v[None])):
        with pytest.raises(KernelError, match=r"H[qkv]"):
            rule.check(*rule.arguments(tensors, {"enable_gqa": True}))
    with pytest.raises(KernelError):
        attend(q, k, v, is_causal=True, enable_gqa=True)


def test_torchs_operator_takes_other_leading_sizes() -> None:
    rule = RULES[torch.ops.aten.scaled_dot_product_attention.default]
    q, few, mask = torch.randn(2, 3, 4, 5, 8), torch.randn(4, 7, 8), torch.ones(5, 7, dtype=torch.bool)
    rule.check(*rule.arguments((q, few, few, mask), {"scale": 0.3}))
    assert torch.equal(attend(q, few, few, mask), F.scaled_dot_product_attention(q, few, few, mask))
    assert torch.equal(attend(q[:, 0], few, few), F.scaled_dot_product_attention(q[:, 0], few, few))


@pytest.mark.parametrize(
    ("operand", "given"),
    [
        ("mask", torch.ones(6, 7, dtype=torch.bool)),
        ("mask", torch.zeros(5, 7).double()),
        ("mask", torch.ones(5, 7, dtype=torch.int64)),
        ("k", torch.randn(1, 2, 7, 9)),
        ("v", torch.randn(1, 2, 8, 8)),
        ("v", torch.randn(1, 2, 7, 8).double()),
        ("q", torch.randn(1, 5, 8)),
        ("q", None),
        ("scale", float("nan")),
    ],
)
def test_the_operand_is_named(operand: str, given: Any) -> None:
    keys = torch.randn(1, 2, 7, 8)
    call: dict[str, Any] = {"q": torch.randn(1, 4, 5, 8), "k": keys, "v": keys, "mask": None, "scale": 0.3}
    cpu.attention(**call)
    with pytest.raises(KernelError):
        cpu.attention(**call | {operand: given})
