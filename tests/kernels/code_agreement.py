"""When two back ends that add up in float32 and in float64 have made the same 4-bit codes."""

import torch
from torch import Tensor

NEAR = 1e-5
# Relative difference of scales: sums in float32 by two orders were seen to differ by 2.3e-6.
SCALES = 5e-6


def assert_codes_agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], values: Tensor) -> None:
    """found, expected: codes i8[..., C] and scales f32[..., G]; values: f32[..., C], what `expected` rounded.

    Codes may differ by one, where a value lies within NEAR steps of the middle between two codes, and nowhere else.
    """
    torch.testing.assert_close(found[1], expected[1], rtol=SCALES, atol=0)
    groups = values.double().unflatten(-1, (expected[1].shape[-1], -1))
    steps = (groups / expected[1].double().unsqueeze(-1)).reshape(values.shape)
    near = (steps - steps.floor() - 0.5).abs() < NEAR
    assert ((found[0].int() - expected[0].int()).abs() <= near).all()
