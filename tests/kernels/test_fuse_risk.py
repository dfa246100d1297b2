"""fuse_risk: the sum by hand, both limits bit for bit, the dynamic rule against numpy, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.fuse_risk.op import OVERLOAD, fuse_risk

INF = float("inf")


def case(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with text at +inf and padding at -inf; the risks of later rows vary more."""
    made = torch.Generator().manual_seed(seed)
    counted = torch.rand(batch, length, generator=made) < 0.7
    scores = torch.where(counted, torch.randn(batch, length, generator=made), INF)
    scores[:, 0], counted[:, 0] = -INF, False
    spread = torch.arange(batch)[:, None] / max(1, batch - 1)
    risk = (0.5 + spread * torch.randn(batch, length, generator=made)).clamp(0, 1)
    return scores, torch.where(counted, risk, 0.0), counted


def test_by_hand() -> None:
    scores, risk = torch.tensor([[0.25, 3.0, INF]]), torch.tensor([[1.0, 0.0, 0.0]])
    counted = torch.tensor([[True, True, False]])
    assert fuse_risk(scores, risk, counted, 0.5, False, False).tolist() == [[0.625, 1.5, INF]]
    assert fuse_risk(scores, risk, counted, 0.75, False, True).tolist()[0] == pytest.approx([0.25, 0.75, INF])


@pytest.mark.parametrize("minmax", [False, True])
def test_ends_are_one_score_alone(minmax: bool) -> None:
    scores, risk, counted = case(4, 33)
    of_scores = fuse_risk(scores, risk, counted, 1.0, False, minmax)
    if not minmax:
        assert torch.equal(of_scores, scores)
    assert torch.equal(of_scores.argsort(dim=1, stable=True), scores.argsort(dim=1, stable=True))
    of_risk = fuse_risk(scores, risk, counted, 0.0, False, minmax)
    assert torch.equal(of_risk, torch.where(counted, risk, scores))


def test_dynamic_alpha_falls_with_the_coefficient_of_variation() -> None:
    scores, risk, counted = case(4, 200)
    found = fuse_risk(scores, risk, counted, 0.55, True, False)
    shares = []
    for row in range(4):
        mine = risk[row][counted[row]].double().numpy()
        share = 0.55 - 0.1 * np.clip(mine.std(ddof=1) / (mine.mean() + 1e-8) - 0.2, 0, 1)
        expected = share * scores[row][counted[row]].double().numpy() + (1 - share) * mine
        assert np.abs(found[row][counted[row]].numpy() - expected).max() < 1e-6
        shares.append(share)
    assert shares[0] == 0.55 and 0.45 < shares[3] < shares[1] < 0.55


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(fuse_risk, (*case(2, 9), 0.55, True, True))
    with pytest.raises(KernelError, match=r"alpha is 1\.5"):
        fuse_risk(*case(2, 9), 1.5, True, True)


class Fused(torch.nn.Module):
    """Fixed and dynamic, of unchanged and of min-max normalised scores."""

    def forward(self, scores: Tensor, risk: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
        ways = [(dynamic, minmax) for dynamic in (False, True) for minmax in (False, True)]
        return tuple(fuse_risk(scores, risk, counted, 0.55, *way) for way in ways)


def test_onnx_computes_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.fuse_risk.onnx import fuse_risk as translation

    exported = export_onnx(Fused(), case(2, 12), {OVERLOAD: translation})
    for batch, length in ((1, 2), (3, 17), (2, 63)):
        inputs = case(batch, length, seed=length)
        for found, expected in zip(exported(*inputs), Fused()(*inputs), strict=True):
            assert torch.allclose(found, expected, atol=1e-6, rtol=0)
