"""Linear layers of few rows in C: float64 sums, rounded once; a row has the same bits in every batch."""

import pytest
import torch
import torch.nn.functional as F

from qpcompile.kernels.linear import cpu
from qpcompile.kernels.native import library as native

LEVELS = range(native.library().level + 1) if native.available() else []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1024, 67), (3, 37, 65), (8, 100, 7), (5, 64, 64), (4, 33, 4)], ids=str
)
def test_linear(shape: tuple[int, int, int], level: int) -> None:
    tokens, columns, features = shape
    torch.manual_seed(sum(shape))
    x, weight = torch.randn(tokens, columns).bfloat16(), torch.randn(features, columns).bfloat16()
    y = cpu._native(x, weight, level)
    # Float32 sums in a different order may round to the neighbour.
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-4)
    for row in range(tokens):
        assert torch.equal(y[row : row + 1], cpu._native(x[row : row + 1], weight, level))


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite(level: int) -> None:
    x, weight = torch.ones(2, 40).bfloat16(), torch.ones(3, 40).bfloat16()
    x[0, 7], weight[1, 39] = torch.inf, torch.nan
    y = cpu._native(x, weight, level)
    assert torch.equal(y.isnan(), torch.tensor([[False, True, False]] * 2)) and y[0, 0].isinf() and y[1, 0] == 40


def test_the_rest_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_native", lambda *given: pytest.fail("few rows without bias alone"))
    x, weight, bias = torch.randn(1, 1, 40), torch.randn(6, 40), torch.randn(6)
    assert torch.equal(cpu.linear(x, weight), F.linear(x[0], weight)[None])
    half = weight.bfloat16()
    assert cpu.linear(x.bfloat16(), half, bias.bfloat16()).shape == (1, 1, 6)
    assert cpu.linear(x.bfloat16().expand(9, 1, 40), half).shape == (9, 1, 6)
    assert cpu.linear(x.bfloat16(), half.repeat(1, 2)[:, ::2]).shape == (1, 1, 6)
    assert cpu.linear(x.bfloat16()[:0], half).shape == (0, 1, 6)
