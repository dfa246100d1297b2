"""A change of basis by factors equals the one by matrices."""

from __future__ import annotations

import pytest
import torch

from qpcompile.calibration.second_moments import SHARE
from qpcompile.calibration.statistics import InputStatistics
from qpcompile.quantization import basis_change as turn
from qpcompile.quantization.basis_change import BasisChange


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize("channels", [8, 12, 40, 86])
def test_factors_do_what_the_matrix_does(
    channels: int, tokens: int, scaled: bool, rotate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(channels)
    scale = torch.rand(channels, generator=random, dtype=torch.float64) + 0.5 if scaled else None
    change = BasisChange(channels, rotate, scale, torch.device("cpu"))
    weight = torch.randn(5, channels, generator=random, dtype=torch.float64)
    found = InputStatistics.empty(channels, moments=True)
    found.add(torch.randn(tokens, channels, generator=random) + 1)
    before = change.weights(weight), change.back(weight[0]), change.statistics(found)
    monkeypatch.setattr(turn, "WIDE", 0)
    after = change.weights(weight), change.back(weight[0]), change.statistics(found)
    assert torch.allclose(after[0], before[0], rtol=0, atol=1e-12)
    assert torch.allclose(after[1], before[1], rtol=0, atol=1e-12)
    assert (tokens > channels // SHARE) == ("moments" in before[2].tensors())
    for name in ("tokens_of_moments" if tokens <= channels // SHARE else "moments", "total", "rows"):
        right = before[2].tensors()[name]
        left = after[2].tensors()[name]
        assert (left - right).abs().max() <= 1e-6 * right.abs().max(), name
    # Products of weights and inputs do not change.
    turned = change.weights(weight) @ after[2].rows.double().T
    assert torch.allclose(turned, weight @ found.rows.double().T, atol=1e-5)
