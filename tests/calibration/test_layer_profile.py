"""Attention mass and cosines by hand."""

from __future__ import annotations

import pytest
import torch

from qpcompile.calibration.layer_profile import attention_mass, pairwise_cosine


def visual(*rows: str) -> torch.Tensor:
    """bool[B, S]; `v` is a visual token."""
    return torch.tensor([[letter == "v" for letter in row] for row in rows])


def test_even_attention_falls_on_the_picture_by_its_share() -> None:
    query, key = torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 5, 4)
    # Text after the picture: positions 3 and 4 see 4 and 5 tokens, two of them visual.
    assert attention_mass(query, key, None, None, visual("tvvtt")) == pytest.approx((2 / 4 + 2 / 5) / 2)


def test_masks_bool_and_float_say_the_same() -> None:
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=made), torch.randn(2, 2, 6, 8, generator=made)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[0, :, :, 0] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    seen = visual("ttvvvt", "tvvttt")
    first, second = (attention_mass(query, key, part, 0.3, seen) for part in (mask, added))
    assert first == pytest.approx(second) and first is not None and 0 < first < 1


def test_matches_softmax_of_one_head() -> None:
    made = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 1, 4, 8, generator=made), torch.randn(1, 1, 4, 8, generator=made)
    weights = ((query[0, 0, 3] @ key[0, 0].T) * 8**-0.5).softmax(dim=-1)
    assert attention_mass(query, key, None, None, visual("tvvt")) == pytest.approx(float(weights[1:3].sum()))


def test_only_the_ten_most_seen_count() -> None:
    row = "v" * 20 + "t"
    query, key = torch.zeros(1, 1, 21, 4), torch.zeros(1, 1, 21, 4)
    assert attention_mass(query, key, None, None, visual(row)) == pytest.approx(10 / 21)


@pytest.mark.parametrize("row", ["tttt", "ttvv"])
def test_no_text_behind_a_picture(row: str) -> None:
    assert attention_mass(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), None, None, visual(row)) is None


def test_cosines_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [9.0, -9.0]]])
    # Pairs: 0 and twice cos 45 degrees.
    assert pairwise_cosine(hidden, visual("vvvt")) == pytest.approx(2 * 0.5**0.5 / 3)
    assert pairwise_cosine(hidden.expand(2, -1, -1), visual("vvtt", "vttt")) == pytest.approx(0.0)
    assert pairwise_cosine(hidden, visual("tvtt")) == 0.0
