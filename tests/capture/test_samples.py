"""Calibration samples can be iterated over repeatedly and are hashed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.feature_extraction_utils import BatchFeature

from qpcompile.capture.samples import Samples
from qpcompile.errors import CalibrationError

TESTBED = Path(__file__).resolve().parents[1] / "testbed"


def sample(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[1, number]]), "pixel_values": torch.full((1, 3, 2, 2), number).to(dtype)}


def test_the_digest_is_that_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    walked, asked = (Samples([sample(1), sample(2)], None, 8, 0) for _ in range(2))
    assert len(list(walked)) == 2
    monkeypatch.setattr(Samples, "__iter__", lambda self: pytest.fail("walked again") if self is walked else ITER(self))
    assert walked.digest() == asked.digest()
    assert Samples([sample(1), sample(3)], None, 8, 0).digest() != asked.digest()


@pytest.mark.parametrize("source", [list, iter])
def test_the_example_is_the_same_for_every_draw(source: Callable[[Any], Any]) -> None:
    drawn = [Samples(source([sample(number) for number in range(9)]), None, 2, seed) for seed in range(3)]
    assert {int(each.example()["input_ids"][0, 1]) for each in drawn} == {0}


def test_half_a_walk_gives_no_digest() -> None:
    samples = Samples([sample(1), sample(2)], None, 8, 0)
    next(iter(samples))
    assert samples.digest() == Samples([sample(1), sample(2)], None, 8, 0).digest()


def test_bfloat16_has_a_digest() -> None:
    assert Samples([sample(1, torch.bfloat16)], None, 8, 0).digest() != Samples([sample(1)], None, 8, 0).digest()


def test_a_source_without_a_picture_is_refused_at_its_first_sample() -> None:
    with pytest.raises(CalibrationError, match="no picture"):
        next(iter(Samples([{"input_ids": torch.tensor([[1, 2]])}], None, 8, 0)))


def test_a_folder_is_checked_before_anything_is_computed(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(TESTBED / "llava")
    (tmp_path / "a.png").write_text("no picture")
    line = {"image": "a.png", "question": "what?", "answer": "red"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    with pytest.raises(CalibrationError, match="not a picture that can be read"):
        Samples(tmp_path, processor, 8, 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps(line | {"question": "what is <image>?"}))
    with pytest.raises(CalibrationError, match=r"holds '<image>'") as error:
        Samples(tmp_path, processor, 8, 0)
    assert error.value.where == f"{tmp_path / 'data.jsonl'}, line 1"


SOURCES: dict[str, tuple[Any, str]] = {
    "one sample": (sample(1), "calibration is one dict, not several samples"),
    "one batch": (BatchFeature(sample(1)), "calibration is one BatchFeature, not several samples"),
    "a number": (7, "calibration is one int, not several samples"),
    "no samples": ((), "there is no calibration sample"),
    "no samples to walk over": (iter(()), "there is no calibration sample"),
}


@pytest.mark.parametrize(("source", "message"), SOURCES.values(), ids=list(SOURCES))
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        Samples(source, None, 8, 0)
    assert error.value.where == "calibration" and error.value.do


WRONG: dict[str, tuple[Any, str]] = {
    "text": ("photos/", "a sample is str, not a dict"),
    "none": (None, "a sample is NoneType, not a dict"),
    "pair": ((1, 2), "a sample is tuple, not a dict"),
    "no ids": ({"pixel_values": torch.zeros(1, 3, 2, 2)}, "no input_ids"),
    "ids of one axis": (sample(1) | {"input_ids": torch.tensor([1, 2])}, "no input_ids"),
    "no tokens": (sample(1) | {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "no input_ids"),
    "ids of floats": (sample(1) | {"input_ids": torch.ones(1, 2)}, "input_ids of torch.float32"),
    "negative ids": (sample(1) | {"input_ids": torch.tensor([[1, -200]])}, "from -200 on"),
    "a mask of another length": (sample(1) | {"attention_mask": torch.ones(1, 3)}, r"attention_mask of \(1, 3\)"),
    "no number": (
        sample(1) | {"pixel_values": torch.full((1, 3, 2, 2), torch.nan)},
        "pixel_values that are not finite",
    ),
    "no picture": ({"input_ids": torch.tensor([[1, 2]])}, "no picture in it"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("source", [list, iter], ids=["list", "iterator"])
def test_samples_that_are_none_are_numbered(wrong: Any, message: str, source: Callable[[list[Any]], Any]) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        list(Samples(source([sample(1), wrong]), None, 8, 0))
    assert error.value.where and "calibration sample 1" in error.value.where and error.value.do


def test_ids_that_are_no_tensor() -> None:
    with pytest.raises(CalibrationError, match="no input_ids"):
        list(Samples([sample(1) | {"input_ids": [[1, 2]]}], None, 8, 0))
    with pytest.raises(CalibrationError, match="input_ids is list, not a tensor") as error:
        Samples(iter([sample(1), sample(1) | {"input_ids": [[1, 2]]}]), None, 8, 0)
    assert error.value.where == "calibration sample 1"


def test_what_an_iterable_raises_is_numbered() -> None:
    def source() -> Iterator[dict[str, Any]]:
        yield sample(1)
        raise KeyError("pixels")

    with pytest.raises(CalibrationError, match="raised KeyError: 'pixels'") as error:
        Samples(source(), None, 8, 0)
    assert error.value.where == "calibration sample 1" and isinstance(error.value.__cause__, KeyError)


def test_an_iterable_is_not_walked_over_further_than_needed() -> None:
    left = iter([sample(1), sample(2), sample(3)])
    assert len(Samples(left, None, 2, 0)) == 2
    assert next(left)["input_ids"].tolist() == [[1, 3]]


def test_entries_that_share_their_memory_are_kept() -> None:
    pixels = torch.arange(24.0).reshape(2, 3, 2, 2)
    shared = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": pixels, "pixel_values_again": pixels[1:]}
    (found,) = Samples(iter([shared]), None, 8, 0)
    assert all(torch.equal(found[key], shared[key]) for key in shared)


ITER = Samples.__iter__
