"""token_scores against full softmax matrices built here in float64, and against requirements of the paper."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.native import library as native
from qpcompile.kernels.token_scores import cpu, reference
from qpcompile.kernels.token_scores.op import OVERLOAD, token_scores
from qpcompile.kernels.token_scores.settings import Attention, Settings, Tokens

DEFAULTS: dict[str, Any] = {
    "weights": [0.45, 0.25, 0.10, 0.20],
    "normalize": "percentile",
    "low": 1.0,
    "high": 99.0,
    "intra_mean": False,
    "rotate": False,
    "group_size": 0,
    "clip_ratio": 1.0,
    "bits": 4,
    "relative": False,
    "sink": 0.0,
}
# (batch, query heads, key heads, tokens, head size, channels)
CASES = [(1, 1, 1, 1, 1, 4), (1, 4, 4, 17, 7, 33), (2, 6, 2, 63, 9, 48), (2, 4, 1, 257, 16, 40)]
MASKS = ["none", "bool", "float", "per_head"]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def make(case: tuple[int, ...], mask: str = "bool") -> dict[str, Any]:
    """Text, picture, text, a smaller picture, text; the first row of a batch begins with padding."""
    batch, heads, groups, length, head_dim, channels = case
    torch.manual_seed(length)
    place = torch.arange(length) / length
    visual = ((place >= 0.2) & (place < 0.6) | (place >= 0.7) & (place < 0.8)).repeat(batch, 1)
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, : length // 8] = False
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
    masks = {
        "none": None,
        "bool": allowed,
        "float": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
        "per_head": torch.randn(batch, heads, length, length).masked_fill(~allowed, -torch.inf),
    }
    hidden = torch.randn(batch, length, channels) * torch.rand(batch, length, 1).exp()
    return {
        "hidden": hidden,
        "rounded": hidden,
        "q": torch.randn(batch, heads, length, head_dim),
        "k": torch.randn(batch, groups, length, head_dim),
        "mask": masks[mask],
        "scale": head_dim**-0.5,
        "visual": visual,
        "valid": valid,
        "queries": text_rows(visual, valid),
    }


def by_reference(given: dict[str, Any], settings: dict[str, Any]) -> Tensor:
    """The reference's scores for the operator's operands."""
    hidden, rounded, *attention, visual, valid, queries = given.values()
    tokens = Tokens(visual, valid, queries)
    return reference.token_scores(hidden, rounded, Attention(*attention), tokens, Settings(**settings))


def text_rows(visual: Tensor, valid: Tensor) -> Tensor:
    """bool[B, S]: text after a row's first visual token."""
    return valid & ~visual & ((visual & valid).cumsum(1) > 0)


def attention(given: dict[str, Any]) -> np.ndarray:
    """Softmax probabilities f64[B, H, S, S]; fully masked rows are 0."""
    q, k, mask = given["q"].double().numpy(), given["k"].double().numpy(), given["mask"]
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = q @ k.swapaxes(-1, -2) * given["scale"]
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() & given["valid"][:, None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    logits = logits + np.where(mask < -1e30, -np.inf, mask.double())
    peak = logits.max(-1, keepdims=True)
    parts = np.exp(logits - np.where(np.isfinite(peak), peak, 0))
    return parts / np.maximum(parts.sum(-1, keepdims=True), 1e-300)


def naive(given: dict[str, Any], row: int, text: list[int], intra_mean: bool = False) -> np.ndarray:
    """Scores f64[V] of the visual tokens of one row, percentile form, text: the query rows of inter."""
    seen = (given["visual"] & given["valid"])[row].numpy().nonzero()[0]
    matrix = attention(given)[row].mean(0)
    values = given["hidden"][row].double().numpy()[seen]
    scale = np.abs(values).max(-1, keepdims=True) / 7
    restored = np.clip(np.rint(values / scale), -8, 7) * scale
    intra = matrix[seen][:, seen].sum(0)
    if intra_mean:
        intra = intra / [sum(query >= key for query in seen) for key in seen]
    metrics = (
        matrix[text][:, seen].sum(0),
        np.linalg.norm(values, axis=-1),
        intra,
        np.linalg.norm(restored - values, axis=-1),
    )
    score = np.zeros(len(seen))
    for weight, metric in zip(DEFAULTS["weights"], metrics, strict=True):
        low, high = np.percentile(metric, [1, 99])
        score += weight * np.clip((metric - low) / (high - low + 1e-6), 0, 1)
    return score


def text_after_image(given: dict[str, Any], row: int) -> list[int]:
    visual, valid = given["visual"][row].tolist(), given["valid"][row].tolist()
    first = next((i for i, (v, ok) in enumerate(zip(visual, valid, strict=True)) if v and ok), len(visual))
    return [i for i in range(first, len(visual)) if valid[i] and not visual[i]]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_equals_the_formula(case: tuple[int, ...], mask: str) -> None:
    given = make(case, mask)
    scores = token_scores(**given, **DEFAULTS)
    counted = given["visual"] & given["valid"]
    for row in range(case[0]):
        expected = naive(given, row, text_after_image(given, row))
        np.testing.assert_allclose(scores[row][counted[row]], expected, atol=1e-4)
    assert (scores[given["valid"] & ~given["visual"]] == torch.inf).all()
    assert (scores[~given["valid"]] == -torch.inf).all()


def test_one_query_per_row_and_mean_of_intra() -> None:
    given = make(CASES[2])
    given["valid"][1, -5:] = False
    given["queries"] = torch.zeros_like(given["valid"])
    given["queries"][0, 62] = given["queries"][1, 57] = given["queries"][1, 60] = True
    scores = token_scores(**given, **DEFAULTS | {"intra_mean": True})
    # Row 60 is not a token, so it has no query.
    for row, last in ((0, 62), (1, 57)):
        counted = (given["visual"] & given["valid"])[row]
        np.testing.assert_allclose(scores[row][counted], naive(given, row, [last], intra_mean=True), atol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("normalize", ["percentile", "mad", "rank", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_equal_the_reference(case: tuple[int, ...], normalize: str, mask: str) -> None:
    given = make(case, mask)
    for options in ({}, {"sink": 1.5}, {"intra_mean": True, "rotate": True, "relative": True}):
        settings: dict[str, Any] = {**DEFAULTS, "normalize": normalize, **options}
        expected = by_reference(given, settings)
        torch.testing.assert_close(token_scores(**given, **settings), expected, **CLOSE)


def test_no_piece_holds_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    given, held = make(CASES[3]), []
    multiply = cpu._products

    def spy(queries: Tensor, keys: Tensor) -> Tensor:
        held.append(multiply(queries, keys))
        return held[-1]

    expected = token_scores(**given, **DEFAULTS)
    monkeypatch.setattr(cpu, "PIECE", 20_000)
    monkeypatch.setattr(cpu, "_products", spy)
    torch.testing.assert_close(token_scores(**given, **DEFAULTS), expected, **CLOSE)
    assert len(held) > 5 and max(each.numel() for each in held) <= 20_000


def test_unasked_metrics_cost_no_query_row(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(CASES[2])

    def fail(*_: object) -> None:
        raise AssertionError("a query row was processed")

    monkeypatch.setattr(cpu, "_products", fail)
    scores = token_scores(**given, **DEFAULTS | {"weights": [0.0, 0.5, 0.0, 0.5]})
    assert torch.isfinite(scores[given["visual"] & given["valid"]]).all()


@pytest.mark.parametrize("mass_of", [reference.attention_mass, cpu.attention_mass], ids=["reference", "cpu"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_mass_over_text_visual_and_rest_is_one_per_query(mass_of: reference.AttentionMass, mask: str) -> None:
    given = make(CASES[2], mask)
    visual, valid = given["visual"], given["valid"]
    before = valid & ~visual & (visual.cumsum(1) == 0)
    text = text_rows(visual, valid)
    groups = torch.stack([text, visual & valid, before], dim=1)
    mass, _ = mass_of(given["q"], given["k"], given["mask"], given["scale"], valid, groups)
    parts = [(mass * keys[:, None]).sum(-1) for keys in (text, visual & valid, ~text & ~(visual & valid))]
    torch.testing.assert_close(sum(parts), groups.sum(-1).float(), rtol=1e-5, atol=1e-5)
    # Queries before the picture cannot see it, and text rows exclude text before the picture.
    assert not (mass[:, 2] * visual).any()
    assert not (text & before).any()


def test_text_before_the_image_changes_no_score() -> None:
    given = make(CASES[2])
    before = (given["visual"].cumsum(1) == 0)[:, None, :, None]
    changed = given | {"q": torch.where(before, torch.randn(given["q"].shape), given["q"])}
    assert torch.equal(token_scores(**given, **DEFAULTS), token_scores(**changed, **DEFAULTS))


def test_residual_by_hand() -> None:
    # Scale 1: 0.5 rounds to 0 and loses 0.5, -1.2 loses 0.2. A zero row loses nothing.
    values = torch.tensor([[[7.0, 0.5, -1.2, 3.0], [0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([[(0.25 + 0.04) ** 0.5, 0.0]])
    torch.testing.assert_close(reference.residual(values, False, 0, 1.0, 4, False), expected)
    share = expected / torch.tensor([[(49 + 0.25 + 1.44 + 9) ** 0.5, 1.0]])
    torch.testing.assert_close(reference.residual(values, False, 0, 1.0, 4, True), share)
    # Groups of two: (7, 0.5) has scale 1, (-1.2, 3) has 3 / 7 and codes -3 and 7.
    grouped = torch.tensor([[(0.25 + (9 / 7 - 1.2) ** 2) ** 0.5, 0.0]])
    torch.testing.assert_close(reference.residual(values, False, 2, 1.0, 4, False), grouped)
    # Hadamard of order 4 over 2: rows (4.65, 1.15, 2.85, 5.35); scale 5.35 / 7, codes 6 2 4 7.
    lost = [6 * 5.35 / 7 - 4.65, 2 * 5.35 / 7 - 1.15, 4 * 5.35 / 7 - 2.85, 0.0]
    rotated = reference.residual(torch.tensor([[[7.0, 0.5, -1.2, 3.0]]]), True, 0, 1.0, 4, False)
    assert rotated.item() == pytest.approx(sum(x * x for x in lost) ** 0.5, rel=1e-5)


def test_sink_channels_count_neither_in_magnitude_nor_in_residual() -> None:
    given = make(CASES[2])
    counted = given["visual"] & given["valid"]
    options = DEFAULTS | {"weights": [0.0, 0.5, 0.0, 0.5], "sink": 50.0}
    expected = token_scores(
        **given | dict.fromkeys(("hidden", "rounded"), given["hidden"] * (torch.arange(48) != 5)), **options
    )
    # A token in the picture is huge in channel 5; one in the text is huge in channel 7, which must be ignored.
    loud = given["hidden"].clone()
    loud[0, 20, 5] = loud[1, 20, 5] = 4000.0
    loud[:, 0, 7] = 9000.0
    found = token_scores(**given | {"hidden": loud, "rounded": loud}, **options)
    assert torch.equal(found, expected)
    plain = token_scores(**given | {"hidden": loud, "rounded": loud}, **options | {"sink": 0.0})
    assert plain[0][counted[0]].argmax() == (counted[0].nonzero().flatten() == 20).nonzero()


def test_residual_may_be_of_another_tensor() -> None:
    given = make(CASES[1])
    other = torch.randn(1, 17, 20)
    options = DEFAULTS | {"weights": [0.0, 0.0, 0.0, 1.0], "normalize": "none"}
    counted = given["visual"] & given["valid"]
    found = token_scores(**given | {"rounded": other}, **options)[counted]
    torch.testing.assert_close(found, reference.residual(other, False, 0, 1.0, 4, False)[counted])


def test_zero_rows_and_missing_kinds_stay_finite() -> None:
    given = make(CASES[2])
    given["hidden"][:, 20:30] = 0
    for visual in (torch.zeros_like(given["visual"]), torch.ones_like(given["visual"]), given["visual"]):
        for normalize in ("percentile", "mad", "rank"):
            scores = token_scores(**given | {"visual": visual}, **DEFAULTS | {"normalize": normalize})
            assert torch.isfinite(scores[visual & given["valid"]]).all()
            assert not scores.isnan().any()


def test_a_row_of_padding_only() -> None:
    given = make(CASES[2])
    given["valid"][0] = False
    given["mask"] = given["mask"] & given["valid"][:, None, None]
    scores = token_scores(**given, **DEFAULTS)
    assert (scores[0] == -torch.inf).all() and not scores[1].isnan().any()


def test_not_contiguous_and_half_precision() -> None:
    given = make(CASES[2])
    expected = token_scores(**given, **DEFAULTS)
    moved = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("hidden", "q", "k", "mask")}
    torch.testing.assert_close(token_scores(**given | moved, **DEFAULTS), expected, **CLOSE)
    halves = {name: given[name].bfloat16() for name in ("hidden", "q", "k")}
    floats = {name: value.float() for name, value in halves.items()}
    torch.testing.assert_close(
        token_scores(**given | halves, **DEFAULTS), token_scores(**given | floats, **DEFAULTS), **CLOSE
    )


@pytest.mark.parametrize("mask", ["none", "per_head"])
def test_opcheck(mask: str) -> None:
    torch.library.opcheck(token_scores, tuple((make(CASES[1], mask) | DEFAULTS).values()))


def test_refusals() -> None:
    given = make(CASES[1])
    for wrong, message in (
        ({"normalize": "softmax"}, "softmax"),
        ({"sink": -1.0}, "sink is -1.0"),
        ({"queries": given["visual"].long()}, "queries is i64"),
        ({"weights": [1.0]}, r"weights is \[1.0\]"),
        ({"low": 99.0, "high": 1.0}, "low is 99.0, high is 1.0"),
        ({"visual": given["visual"].long()}, "visual is i64"),
        ({"mask": given["mask"][0]}, "dimensions"),
    ):
        with pytest.raises(KernelError, match=message):
            token_scores(**given | DEFAULTS | wrong)


class Score(torch.nn.Module):
    """A layer's queries and keys [B, S, heads, D], scored with several settings and kinds of mask."""

    def __init__(self, settings: list[tuple[str, dict[str, Any]]]) -> None:
        super().__init__()
        self.settings = settings

    def forward(
        self, hidden: Tensor, q: Tensor, k: Tensor, visual: Tensor, valid: Tensor, queries: Tensor
    ) -> list[Tensor]:
        length = q.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
        masks = {"none": None, "bool": allowed, "float": torch.where(allowed, 0.0, torch.finfo(torch.float32).min)}
        rest = {"hidden": hidden, "rounded": hidden, "q": q.transpose(1, 2), "k": k.transpose(1, 2)}
        rest |= {"visual": visual, "valid": valid, "queries": queries}
        return [token_scores(**rest, mask=masks[mask], scale=0.4, **options) for mask, options in self.settings]


def test_onnx_scores_and_selects_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.token_scores.onnx import token_scores as translation

    settings = [
        ("bool", DEFAULTS | {"rotate": True}),
        ("float", DEFAULTS | {"intra_mean": True, "relative": True, "group_size": 16, "clip_ratio": 0.9}),
        ("bool", DEFAULTS | {"weights": [1.0, 0.0, 0.0, 0.0], "normalize": "none"}),
        ("bool", DEFAULTS | {"sink": 1.2, "weights": [0.0, 1.0, 0.0, 1.0]}),
        ("none", DEFAULTS | {"normalize": "mad", "weights": [0.5, 0.0, 0.5, 0.0]}),
        ("none", DEFAULTS | {"normalize": "rank", "weights": [0.0, 0.5, 0.0, 0.5]}),
    ]

    def inputs(batch: int, length: int) -> list[Tensor]:
        given = make((batch, 6, 2, length, 9, 48))
        moved = [given[name].transpose(1, 2).contiguous() for name in ("q", "k")]
        return [given["hidden"], *moved, given["visual"], given["valid"], given["queries"]]

    module = Score(settings)
    exported = export_onnx(module, inputs(2, 40), {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 63), (1, 257)):
        given = inputs(batch, length)
        for got, expected in zip(exported(*given), module(*given), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)
            order = [scores.argsort(dim=1, descending=True, stable=True) for scores in (got, expected)]
            assert torch.equal(*order)


# (batch, query heads, key heads, tokens, head size): above and below the tile sizes, and the near miss in rows.
TILED = [(1, 1, 1, 32, 1), (2, 6, 2, 63, 9), (1, 4, 4, 33, 64), (2, 4, 1, 257, 40)]


def bfloat16_mass(case: tuple[int, ...], mask: str, seen: float = 1.0) -> tuple[Any, ...]:
    """Arguments of attention_mass in bfloat16, tokens outside heads as projections leave them, two groups."""
    batch, heads, groups, length, size = case
    torch.manual_seed(length)
    q, k = (torch.randn(batch, length, count, size).bfloat16().transpose(1, 2) for count in (heads, groups))
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, : length // 8] = False
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
    per_head = torch.rand(batch, heads, length, length) < seen
    masks = {"none": None, "bool": allowed, "per_head": allowed & per_head}
    asked = torch.rand(batch, 2, length) < 0.6
    return q, k, masks[mask], size**-0.5, valid, asked & valid[:, None]


@pytest.mark.skipif(not native.library().amx, reason="the processor has no AMX tiles")
@pytest.mark.parametrize("mask", ["none", "bool", "per_head"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_attention_on_tiles_is_the_references(case: tuple[int, ...], mask: str) -> None:
    """Products of bfloat16 are exact in float32: the error is the summation order and 2e-7 of a power."""
    given = bfloat16_mass(case, mask, 0.3)
    with native.noted() as calls:
        found = cpu.attention_mass(*given)
    assert [each.symbol for each in calls] == ["attention_mass_amx"]
    for ours, theirs in zip(found, reference.attention_mass(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(not native.library().amx, reason="the processor has no AMX tiles")
def test_attention_on_tiles_at_its_edges() -> None:
    """No queries, fully masked rows, scores of thousands, and identical results with more threads."""
    q, k, _, scale, valid, groups = bfloat16_mass((1, 4, 2, 70, 16), "none")
    assert not cpu.attention_mass(q, k, None, scale, valid, torch.zeros_like(groups))[0].any()
    blind = torch.zeros(1, 1, 70, 70, dtype=torch.bool)
    assert not cpu.attention_mass(q, k, blind, scale, valid, groups)[0].any()
    far = 1000 * q, k, None, scale, valid, groups
    torch.testing.assert_close(cpu.attention_mass(*far)[0], reference.attention_mass(*far)[0], rtol=1e-4, atol=1e-4)
    one = cpu.attention_mass(q, k, None, scale, valid, groups)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(cpu.attention_mass(q, k, None, scale, valid, groups)[0], one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "length", "mask"), [("float32", 64, "bool"), ("bfloat16", 15, "bool")])
def test_other_attention_stays_with_torch(dtype: str, length: int, mask: str) -> None:
    """The near misses: another type, and too few rows for the tiles."""
    q, k, *rest = bfloat16_mass((1, 2, 2, length, 8), mask)
    with native.noted() as calls:
        found = cpu.attention_mass(q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype)), *rest)
    assert not calls
    for ours, theirs in zip(found, reference.attention_mass(q, k, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
