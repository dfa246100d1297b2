"""The sample that a model is traced and checked with where there is no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from qpcompile.capture.chat import about_picture, chat_inputs
from qpcompile.capture.load import load_processor
from qpcompile.errors import CalibrationError


def blank_sample(model: Any, processor: Any) -> dict[str, Any]:
    """A white picture and a short prompt, to trace a model without samples."""
    folder = model.name_or_path
    if processor is None and folder and Path(folder).is_dir():
        processor = load_processor(folder)
    if processor is None:
        raise CalibrationError(
            "there is nothing to trace the model with: neither samples nor a processor",
            where=type(model).__name__,
            do="pass processor=... or calibration=[inputs]",
        )
    picture = Image.new("RGB", (224, 224), "white")
    return chat_inputs(
        processor, [about_picture(picture, "what is this?")], ["a white picture to trace the model with"]
    )
