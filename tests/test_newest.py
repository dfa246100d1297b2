"""One testbed end to end with the installed versions; `make test-newest-short` runs it with the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

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
    loaded: Any = qpcompile.load(tmp_path / "out")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    question = read_questions(BEDS / "calibration" / "llava")[0]
    inputs = question_inputs(processor, [question])
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(loaded.generate(**inputs, **settings), expected)
    assert torch.equal(compiled.generate(**inputs, **settings), expected)
    # transformers' own pipeline takes a compiled model.
    pipe = pipeline("image-text-to-text", model=loaded, processor=loaded.processor)
    picture = {"type": "image", "image": Image.open(BEDS / "calibration" / "llava" / question.picture)}
    chat: Any = [{"role": "user", "content": [picture, {"type": "text", "text": question.question}]}]
    (answer,) = pipe(text=chat, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    (text,) = processor.batch_decode(expected[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["generated_text"].strip() == text.strip()
    assert "CompiledVLM" in repr(pipe)
