"""One testbed end to end with the installed versions; `make test-newest-short` runs it with the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import qpcompile
from qpcompile.capture.data_folder import question_inputs, read_questions

BEDS = Path(__file__).resolve().parent / "testbed"
NEW = 6


@pytest.mark.slow
def test_compile_save_load_and_answer(tmp_path: Path) -> None:
    """Nothing quantized: the answers of the loaded artifact equal those of the model."""
    folder = BEDS / "llava"
    compiled = qpcompile.compile(folder, "none", calibration=BEDS / "calibration" / "llava")
    compiled.save_pretrained(tmp_path / "out")
    loaded = qpcompile.load(tmp_path / "out")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    question = read_questions(BEDS / "calibration" / "llava")[0]
    inputs = question_inputs(processor, [question])
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(loaded.generate(**inputs, **settings), expected)
    assert torch.equal(compiled.generate(**inputs, **settings), expected)
