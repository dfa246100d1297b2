"""quantization_risk: every metric against plain numpy, awkward widths, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.quantization_risk.op import OVERLOAD, quantization_risk
from qpcompile.kernels.quantization_risk.reference import METRICS

Array = np.ndarray[Any, Any]


def case(batch: int, length: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of very different size, with an outlier channel; row i counts all but the first i."""
    made = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, length, width, generator=made) * torch.rand(batch, length, 1, generator=made) * 3
    features[:, :, 0] *= 10
    return features, torch.arange(length).expand(batch, length) >= torch.arange(batch)[:, None]


def rounding_error(v: Array, size: int) -> float:
    """One token, group by group."""
    lost = 0.0
    for start in range(0, len(v), size):
        group = v[start : start + size]
        scale = np.abs(group).max() / 7
        lost += float(((group - np.round(group / (scale + 1e-8)) * scale) ** 2).sum())
    return lost**0.5


def clipped_error(v: Array) -> float:
    top = np.percentile(np.abs(v), 99)
    scale = top / 7
    return float(np.linalg.norm(v - np.round(np.clip(v, -top, top) / (scale + 1e-8)) * scale))


def minmax(values: Array) -> Array:
    return (values - values.min() + 1e-8) / (values.max() - values.min() + 1e-8)


def by_formulas(tokens: Array, metric: str, size: int) -> Array:
    """tokens: f[N, C] of one row -> f[N]."""
    errors = np.array([rounding_error(v, size) for v in tokens])
    spreads = np.array([v.max() - v.min() for v in tokens])
    if metric == "complex":
        return minmax(errors) / 2 + minmax(spreads) / 2
    if metric == "complex_l1":
        return errors / (errors.sum() + 1e-8) / 2 + spreads / (spreads.sum() + 1e-8) / 2
    plain = {
        "complex_mul": errors * spreads,
        "quant_error_group": errors,
        "quant_error": np.array([rounding_error(v, len(v)) for v in tokens]),
        "quant_error_clip": np.array([clipped_error(v) for v in tokens]),
        "dynamic_range": spreads,
        "variance": tokens.var(axis=1),
        "l2_norm": np.linalg.norm(tokens, axis=1),
        "l1_norm": np.abs(tokens).mean(axis=1),
        "l_inf": np.abs(tokens).max(axis=1),
    }
    return minmax(plain[metric])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("width", "size"), [(96, 128), (48, 20), (64, 16), (1, 1)])
def test_equals_the_formulas(metric: str, width: int, size: int) -> None:
    features, counted = case(3, 19, width)
    found = quantization_risk(features, counted, metric, size)
    for row in range(3):
        mine = features[row][counted[row]].double().numpy()
        expected = by_formulas(mine, metric, size)
        assert np.abs(found[row][counted[row]].numpy() - expected).max() < 1e-6, (metric, width)
        assert not found[row][~counted[row]].any()
    assert found.min() >= 0 and found.max() <= 1 + 1e-6


def test_an_outlier_channel_is_a_risk() -> None:
    features = torch.randn(1, 20, 64)
    features[0, 7, 3] = 50.0
    everything = torch.ones(1, 20, dtype=torch.bool)
    for metric in METRICS:
        if metric != "l1_norm" and metric != "quant_error_clip":
            assert quantization_risk(features, everything, metric, 32)[0].argmax() == 7, metric


def test_a_token_alone_and_equal_tokens_have_the_full_risk() -> None:
    features, everything = torch.randn(1, 1, 16).expand(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    assert quantization_risk(features, everything, "complex", 8).tolist() == [[1.0] * 4]
    assert not quantization_risk(features, ~everything, "complex_l1", 8).any()


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(quantization_risk, (*case(2, 9, 5), "complex", 4))
    with pytest.raises(KernelError, match="metric is 'l3_norm'"):
        quantization_risk(*case(2, 9, 5), "l3_norm", 4)
    with pytest.raises(KernelError, match="group_size is 0"):
        quantization_risk(*case(2, 9, 5), "complex", 0)


class Risks(torch.nn.Module):
    """All metrics, with a group size that does not divide the width."""

    def forward(self, features: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
        return tuple(quantization_risk(features, counted, metric, 20) for metric in METRICS)


def test_onnx_computes_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.quantization_risk.onnx import quantization_risk as translation

    exported = export_onnx(Risks(), case(2, 12, 48), {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 63)):
        inputs = case(batch, length, 48, seed=length)
        inputs[0][:, length // 2] = 0
        for metric, found, expected in zip(METRICS, exported(*inputs), Risks()(*inputs), strict=True):
            assert torch.allclose(found, expected, atol=1e-6, rtol=0), metric
