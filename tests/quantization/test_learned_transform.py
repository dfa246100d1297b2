"""The trained factors: exact before rounding, rotations remain rotations, the initialisation lowers the noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.quantization.block_sums import SumsOfMatrix
from qpcompile.quantization.fake_quant import round_trip
from qpcompile.quantization.learned_transform import LearnedTransform, balanced_factors, cayley, kronecker_rows, rounded
from qpcompile.recipe.quantize import ActivationScheme


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(left=st.integers(1, 6), right=st.integers(1, 6), rotation=st.booleans(), seed=st.integers(0, 99))
def test_inputs_and_weights_cancel(left: int, right: int, rotation: bool, seed: int) -> None:
    learned = LearnedTransform(rotation, left, right, 0.9)
    with torch.no_grad():
        learned.left.add_(0.2 * noise(left, left, seed=seed))
        learned.right.add_(0.2 * noise(right, right, seed=seed + 1))
    x, weight = noise(7, left * right), noise(5, left * right, seed=2)
    y = kronecker_rows(x, *learned.factors()) @ learned.weights(weight).T
    assert torch.allclose(y, x @ weight.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_cayley_gives_rotations(size: int) -> None:
    found = cayley(noise(size, size)).double()
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-5)
    assert torch.equal(cayley(torch.zeros(size, size)), torch.eye(size))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 4])
def test_rounds_as_the_operator_does(group: int, bits: int) -> None:
    x = noise(3, 5, 12)
    assert torch.allclose(rounded(x, group, 0.8, bits), round_trip(x, group, 0.8, bits), atol=1e-6)


def test_gradients_reach_everything_that_is_learned() -> None:
    learned = LearnedTransform(False, 3, 4, 0.9)
    weight = rounded(learned.weights(noise(5, 12, seed=1)), 0, 1.0, 4)
    loss = (learned.inputs(noise(6, 12), ActivationScheme()) @ weight.T).pow(2).sum()
    loss.backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in learned.parameters())


def test_beginning_is_the_least_noise_of_all_factors_nearby() -> None:
    x = noise(400, 12) @ torch.kron(noise(3, 3, seed=3), noise(4, 4, seed=4))
    second, gram = (x.T @ x / 400).double(), (lambda w: w.T @ w)(noise(9, 12, seed=5)).double()

    def cost(left: torch.Tensor, right: torch.Tensor) -> float:
        turn = torch.kron(left.double(), right.double())
        inverse = torch.linalg.inv(turn)
        return float((turn @ second @ turn.T).trace() * (inverse.T @ gram @ inverse).trace())

    left, right = balanced_factors(SumsOfMatrix((3, 4), second), SumsOfMatrix((3, 4), gram))
    best = cost(left, right)
    assert best < 0.7 * cost(torch.eye(3), torch.eye(4))
    for seed in range(20):
        near = left + 0.05 * noise(3, 3, seed=seed), right + 0.05 * noise(4, 4, seed=seed + 50)
        assert best < cost(*near) * 1.02
