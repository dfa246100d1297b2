"""What training will take is told once a graph, with the graphs after it and with faster choices."""

from __future__ import annotations

import logging

import pytest

from qpcompile.quantization.training_time import TrainingTime, words
from qpcompile.recipe.quantize import TrainingScheme


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_long_training_is_told_with_what_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    time = TrainingTime(TrainingScheme(epochs=8, samples=32))
    for _ in range(4):
        time.add_forward("vision", 2.0)
        time.add_forward("prefill", 10.0)
    with caplog.at_level(logging.INFO, logger="qpcompile"):
        time.tell("vision", blocks=3, batches=4, step=5.0, forward=4.0)
        time.tell("vision", blocks=3, batches=4, step=5.0, forward=4.0)
        time.tell("prefill", blocks=32, batches=4, step=0.01, forward=4.0)
    first, second = told(caplog)
    # A block: 8 epochs of 4 steps of 5 s. Prefill: 40 s in full precision, where training takes 8 * 20 / 4 of that.
    line, faster = first.splitlines()
    assert line == "train vision: about 3 min a block, 8 min for 3, 35 min with prefill"
    for choice in ("quantize.transform=hadamard", "quantize.training.epochs (8)", "quantize.training.samples (32)"):
        assert choice in faster
    assert second == "train prefill: about 0.32 s a block, 10 s for 32"


def test_durations_are_read_at_a_glance() -> None:
    assert [words(seconds) for seconds in (0.123, 59.6, 100, 5999, 7200)] == [
        "0.12 s",
        "60 s",
        "2 min",
        "100 min",
        "2.0 h",
    ]
