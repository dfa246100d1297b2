"""The three normalisations against numpy, row by row, with uncounted entries, ties and tiny rows."""

import numpy as np
import pytest
import torch

from qpcompile.kernels.token_scores.normalize import masked_percentile, mean_rank, normalize_metric

LENGTHS = [1, 2, 17, 63, 257]


def rows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """metric: f32[3, length], counted: bool[3, length] with at least one entry each."""
    torch.manual_seed(length)
    metric = torch.randn(3, length) * torch.tensor([[1.0], [100.0], [1e-3]])
    counted = torch.rand(3, length) < 0.6
    counted[:, length // 2] = True
    return metric, counted


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("percent", [0, 1, 37.5, 50, 99, 100])
def test_percentile_equals_numpy(length: int, percent: float) -> None:
    metric, counted = rows(length)
    got = masked_percentile(metric, counted, percent)[:, 0]
    for row in range(3):
        expected = np.percentile(metric[row][counted[row]].double().numpy(), percent)
        assert got[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_percentile_form(length: int) -> None:
    metric, counted = rows(length)
    got = normalize_metric(metric, counted, "percentile", 1, 99)
    for row in range(3):
        values = metric[row][counted[row]].double().numpy()
        low, high = np.percentile(values, [1, 99])
        expected = np.clip((values - low) / (high - low + 1e-6), 0, 1)
        np.testing.assert_allclose(got[row][counted[row]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_mad_form(length: int) -> None:
    metric, counted = rows(length)
    got = normalize_metric(metric, counted, "mad", 1, 99)
    for row in range(3):
        values = metric[row][counted[row]].double().numpy()
        spread = np.median(np.abs(values - np.median(values)))
        z = np.clip((values - np.median(values)) / (1.4826 * spread + 1e-6), -3, 3)
        np.testing.assert_allclose(got[row][counted[row]], (z + 3) / 6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_rank_counts_smaller_entries_and_half_of_the_equal_ones(length: int) -> None:
    _, counted = rows(length)
    metric = torch.randint(0, 5, (3, length)).float()
    got = mean_rank(metric, counted)
    for row in range(3):
        values = metric[row][counted[row]]
        expected = [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
        assert torch.equal(got[row][counted[row]], torch.tensor(expected))


def test_rank_by_hand() -> None:
    metric = torch.tensor([[5.0, 1.0, 9.0, 5.0, 2.0]])
    counted = torch.tensor([[True, True, False, True, True]])
    got = normalize_metric(metric, counted, "rank", 1, 99)[counted]
    torch.testing.assert_close(got, torch.tensor([2.5, 0.0, 2.5, 1.0]) / 3)


@pytest.mark.parametrize("method", ["percentile", "mad", "rank"])
def test_equal_entries_stay_equal_and_finite(method: str) -> None:
    metric, counted = torch.full((2, 9), 3.5), torch.ones(2, 9, dtype=torch.bool)
    got = normalize_metric(metric, counted, method, 1, 99)
    assert torch.isfinite(got).all() and len(got.unique()) == 1


@pytest.mark.parametrize("method", ["percentile", "mad", "rank"])
def test_uncounted_entries_have_no_influence(method: str) -> None:
    metric, counted = rows(63)
    spoiled = torch.where(counted, metric, torch.randn(3, 63) * 1e6)
    first = normalize_metric(metric, counted, method, 1, 99)
    second = normalize_metric(spoiled, counted, method, 1, 99)
    assert torch.equal(first[counted], second[counted])
