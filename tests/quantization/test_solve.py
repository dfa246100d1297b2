"""Rounding to 4 bits, to nearest and with GPTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qpcompile.calibration import second_moments
from qpcompile.calibration.second_moments import SecondMoments
from qpcompile.calibration.statistics import InputStatistics
from qpcompile.errors import CalibrationError
from qpcompile.quantization.products import solve_weight
from qpcompile.quantization.solve import output_error, solve
from qpcompile.quantization.solvers.gptq import LEAST_DAMPING, _inverse_rows
from qpcompile.recipe.quantize import WeightScheme


def scheme(**settings: Any) -> WeightScheme:
    return WeightScheme(**{"solver": "rtn", "clip_search": False, **settings})


def correlated(channels: int, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """Inputs that share a few directions, f32[tokens, channels]."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 4, generator=made) @ torch.randn(4, channels, generator=made)
    return x + 0.1 * torch.randn(tokens, channels, generator=made)


def matrix_of(x: torch.Tensor) -> SecondMoments:
    return SecondMoments(x.T @ x)


def test_nearest_by_hand() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.4, 0.5], [0.7, 0.15, -0.05, 0.0]])
    codes, scale = solve(weight, None, scheme())
    assert scale.flatten().tolist() == pytest.approx([1.0, 0.1])
    assert codes.dtype == torch.int8
    assert codes[0].tolist() == [7, -7, 3, 0]  # halves round to even
    assert codes[1].tolist()[0] == 7 and codes[1].tolist()[3] == 0


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.tensor([[7.0, 1.0, 0.07, 0.01]])
    codes, scale = solve(weight, None, scheme(granularity="group", group_size=2))
    assert scale.shape == (1, 2) and scale.flatten().tolist() == pytest.approx([1.0, 0.01])
    assert codes.tolist() == [[7, 1, 7, 1]]


def test_rows_of_zeros_have_scale_one() -> None:
    codes, scale = solve(torch.zeros(2, 4), None, scheme())
    assert codes.eq(0).all() and scale.eq(1).all()
    assert output_error(torch.zeros(2, 4), codes, scale, None) == 0


@pytest.mark.parametrize("seed", range(4))
def test_clip_search_never_does_worse(seed: int) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) ** 3
    errors = [output_error(weight, *solve(weight, None, scheme(clip_search=search)), None) for search in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("channels", [5, 48, 200])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_does_better_on_correlated_inputs(channels: int, seed: int) -> None:
    weight = torch.randn(16, channels, generator=torch.Generator().manual_seed(seed))
    moments = matrix_of(correlated(channels, seed))
    nearest = output_error(weight, *solve(weight, moments, scheme()), moments)
    gptq = output_error(weight, *solve(weight, moments, scheme(solver="gptq")), moments)
    assert gptq < nearest


def test_gptq_is_nearest_on_inputs_without_correlation() -> None:
    weight = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    found, _ = solve(weight, SecondMoments(torch.eye(150) * 3), scheme(solver="gptq"))
    nearest, _ = solve(weight, None, scheme())
    assert torch.equal(found, nearest)


def test_gptq_without_moments_rounds_to_nearest() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve(weight, None, scheme(solver="gptq"))[0], solve(weight, None, scheme())[0])


def test_gptq_by_hand() -> None:
    # Two equal inputs: the second weight compensates the rounding error of the first.
    weight = torch.tensor([[0.4, 7.0, 0.3]])
    moments = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    codes, scale = solve(weight, SecondMoments(moments), scheme(solver="gptq", damping=0.001))
    assert scale.item() == 1.0 and codes.tolist() == [[0, 7, 1]]


def test_inputs_that_never_fire_do_no_harm() -> None:
    x = correlated(8)
    x[:, 3] = 0
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    codes, scale = solve(weight, matrix_of(x), scheme(solver="gptq"))
    assert codes[:, 3].eq(0).all() and scale.isfinite().all()
    assert solve(weight, SecondMoments(torch.zeros(8, 8)), scheme(solver="gptq"))[0].shape == (4, 8)
    assert solve(weight, SecondMoments.empty(8), scheme(solver="gptq"))[0].shape == (4, 8)


def test_error_is_that_of_the_outputs() -> None:
    made = torch.Generator().manual_seed(2)
    weight, x = torch.randn(5, 12, generator=made), torch.randn(90, 12, generator=made)
    codes, scale = solve(weight, None, scheme())
    rounded = codes * scale
    expected = ((weight - rounded) @ x.T).norm() / (weight @ x.T).norm()
    for moments in (matrix_of(x), SecondMoments(None, x)):
        assert output_error(weight, codes, scale, moments) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("form", ["matrix", "tokens", "tokens, hardly damped"])
@pytest.mark.parametrize(("channels", "tokens"), [(1, 1), (2, 1), (7, 9), (257, 30), (700, 3), (1100, 200)])
def test_factor_of_the_inverse_is_that_of_its_definition(
    channels: int, tokens: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_moments, "STRIP", 100)
    damping = LEAST_DAMPING / 2 if "hardly" in form else 0.01
    x = correlated(channels, tokens=tokens)
    dead = torch.zeros(channels, dtype=torch.bool)
    dead[1::5] = True
    x[:, dead] = 0
    moments = matrix_of(x) if form == "matrix" else SecondMoments(None, x.clone())
    hessian = x.double().T @ x.double()
    hessian[dead, dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    alive, found, start = (~dead).nonzero()[:, 0], torch.zeros(channels, channels), 0
    for rows in _inverse_rows(moments, dead, damping):
        assert rows.dtype == torch.float32 and rows.shape[1] == channels - start
        found[start : start + len(rows), start:] = rows
        start += len(rows)
    assert start == channels and torch.equal(moments.dense(), x.T @ x)
    upper = found.triu()[alive][:, alive].double()
    assert (upper.diagonal() > 0).all()
    assert found[alive][:, dead.nonzero()[:, 0]].eq(0).all()
    expected = torch.eye(len(alive)).double()
    torch.testing.assert_close(upper.T @ upper @ hessian[alive][:, alive], expected, rtol=0, atol=2e-6 / damping)


@pytest.mark.parametrize(("channels", "tokens"), [(40, 10), (700, 60)])
def test_gptq_of_few_tokens_is_that_of_their_matrix(channels: int, tokens: int) -> None:
    """The codes differ where a weight lies on a rounding boundary only."""
    x = correlated(channels, tokens=tokens)
    weight = torch.randn(16, channels, generator=torch.Generator().manual_seed(4))
    one, _ = solve(weight, SecondMoments(None, x), scheme(solver="gptq"))
    other, scale = solve(weight, matrix_of(x), scheme(solver="gptq"))
    assert (one != other).double().mean() < 0.01
    assert output_error(weight, one, scale, matrix_of(x)) < 0.5 * output_error(
        weight, *solve(weight, None, scheme()), matrix_of(x)
    )


HARD = {
    "a channel 1e4 times the others": lambda x: x * torch.where(torch.arange(x.shape[1]) == 5, 1e4, 1.0),
    "a token 1e4 times the others": lambda x: x * torch.where(torch.arange(len(x)) == 5, 1e4, 1.0)[:, None],
    "one token, many times": lambda x: x[:1].expand(len(x), -1),
    "channels that are constant": lambda x: torch.where(torch.arange(x.shape[1]) % 2 == 0, 3.0, x),
    "channels that never fire": lambda x: torch.where(torch.arange(x.shape[1]) % 3 == 0, 0.0, x),
    "sixteen bits": lambda x: x.bfloat16().float(),
    "nothing": lambda x: x * 0,
}


@pytest.mark.parametrize("change", HARD.values(), ids=list(HARD))
def test_gptq_of_hard_tokens_is_that_of_their_matrix(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made = torch.Generator().manual_seed(0)
    x, weight = change(correlated(640, tokens=100)), torch.randn(16, 640, generator=made)
    asked = scheme(solver="gptq")
    (few, scale), (many, _) = (solve(weight, moments, asked) for moments in (SecondMoments(None, x), matrix_of(x)))
    assert int((few != many).sum()) <= 0.02 * few.numel()
    errors = [output_error(weight, codes, scale, matrix_of(x)) for codes in (few, many)]
    assert errors[0] <= errors[1] + 1e-3


@pytest.mark.parametrize("tokens", [2, 400])
def test_moments_without_an_inverse_are_refused(tokens: int) -> None:
    statistics = InputStatistics.empty(8, moments=True)
    statistics.add(correlated(8, tokens=tokens) * torch.nan)
    with pytest.raises(CalibrationError, match="have no inverse") as error:
        solve_weight(torch.ones(4, 8), "layer.3", {"layer.3": statistics}, scheme(solver="gptq"), torch.device("cpu"))
    assert error.value.where == "layer.3"
