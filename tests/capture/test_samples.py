"""Calibration samples are walked over as often as needed and digested once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpcompile.capture.samples import Samples
from qpcompile.errors import CalibrationError


def sample(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[1, number]]), "pixel_values": torch.full((1, 3, 2, 2), number).to(dtype)}


def test_the_digest_is_that_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    walked, asked = (Samples([sample(1), sample(2)], None, 8, 0) for _ in range(2))
    assert len(list(walked)) == 2
    monkeypatch.setattr(Samples, "__iter__", lambda self: pytest.fail("walked again") if self is walked else ITER(self))
    assert walked.digest() == asked.digest()
    assert Samples([sample(1), sample(3)], None, 8, 0).digest() != asked.digest()


def test_half_a_walk_gives_no_digest() -> None:
    samples = Samples([sample(1), sample(2)], None, 8, 0)
    next(iter(samples))
    assert samples.digest() == Samples([sample(1), sample(2)], None, 8, 0).digest()


def test_bfloat16_has_a_digest() -> None:
    assert Samples([sample(1, torch.bfloat16)], None, 8, 0).digest() != Samples([sample(1)], None, 8, 0).digest()


def test_a_source_without_a_picture_is_refused_at_its_first_sample() -> None:
    with pytest.raises(CalibrationError, match="no picture"):
        next(iter(Samples([{"input_ids": torch.tensor([[1, 2]])}], None, 8, 0)))


ITER = Samples.__iter__
