"""The two simulations: NF4 with inputs per channel (Q-VLM), and keys per channel over tokens (KIVI)."""

import pytest
import torch

from qpcompile.kernels.simulate_kivi import op as kivi_op
from qpcompile.kernels.simulate_kivi.reference import GROUP, simulate_kivi
from qpcompile.kernels.simulate_qvlm import op as qvlm_op
from qpcompile.kernels.simulate_qvlm.reference import nf4, nf4_levels, simulate_qvlm


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nf4_levels_are_those_published() -> None:
    # QLoRA (arXiv 2305.14314), appendix E, to four digits.
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    assert nf4_levels().tolist() == pytest.approx(published, abs=1.5e-4)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_nf4_takes_the_nearest_level_of_each_block(columns: int) -> None:
    weight = made(3, columns)
    found = nf4(weight)
    for start in range(0, columns, 64):
        block, got = weight[:, start : start + 64], found[:, start : start + 64]
        levels = block.abs().amax(dim=1, keepdim=True)[..., None] * nf4_levels()
        nearest = (block[..., None] - levels).abs().amin(dim=-1)
        assert torch.allclose((block - got).abs(), nearest, atol=1e-6)


def test_nf4_of_zero_is_zero() -> None:
    assert not nf4(torch.zeros(2, 70)).any()


def test_qvlm_rounds_each_channel_in_its_range() -> None:
    x = torch.tensor([[0.0, -3.0], [15.0, 3.0], [7.4, 100.0]])
    got = simulate_qvlm(x, torch.tensor([0.0, -3.0]), torch.tensor([15.0, 3.0]))
    assert torch.allclose(got, torch.tensor([[0.0, -3.0], [15.0, 3.0], [7.0, 3.0]]), atol=1e-6)


def test_qvlm_channel_without_range_stays_finite() -> None:
    assert simulate_qvlm(torch.tensor([[2.0]]), torch.tensor([2.0]), torch.tensor([2.0])).tolist() == [[2.0]]


def test_kivi_keys_lose_half_a_step_of_their_group() -> None:
    x = made(1, 2, 2 * GROUP + 5, 7)
    got = simulate_kivi(x, 15, key=True, residual=0)
    groups = x[:, :, : 2 * GROUP].unflatten(2, (2, GROUP))
    step = (groups.amax(3) - groups.amin(3)) / 15
    error = (got[:, :, : 2 * GROUP].unflatten(2, (2, GROUP)) - groups).abs().amax(3)
    assert (error <= 0.5001 * step).all() and (error > 0).any()
    assert torch.equal(got[:, :, 2 * GROUP :], x[:, :, 2 * GROUP :]), "an open group stays as it is"


def test_kivi_values_are_rounded_token_by_token() -> None:
    x = made(1, 2, 10, 40)
    got = simulate_kivi(x, 15, key=False, residual=3)
    assert torch.equal(got[:, :, 7:], x[:, :, 7:]) and not torch.equal(got[:, :, :7], x[:, :, :7])
    assert torch.equal(simulate_kivi(x[:, :, :5], 15, key=False, residual=0), got[:, :, :5])


def test_kivi_key_scales_see_their_neighbours() -> None:
    x = made(1, 1, GROUP, 4)
    other = x.clone()
    other[:, :, 0] *= 50
    assert not torch.equal(simulate_kivi(x, 15, True, 0)[:, :, 1:], simulate_kivi(other, 15, True, 0)[:, :, 1:])


def test_short_cache_stays_as_it_is() -> None:
    x = made(1, 2, 128, 4)
    assert torch.equal(simulate_kivi(x, 15, True), x)


def test_operators_are_well_formed() -> None:
    torch.library.opcheck(qvlm_op.OVERLOAD, (made(2, 3, 4), -torch.ones(4), torch.ones(4)))
    torch.library.opcheck(kivi_op.OVERLOAD, (made(1, 1, 200, 4), 15, True))
