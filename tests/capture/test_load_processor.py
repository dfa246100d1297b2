"""Folders without a processor."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from qpcompile.capture.load import load_model
from qpcompile.errors import ModelError


def test_a_folder_without_a_processor_loads_for_those_who_have_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    config, weights = folder / "config.json", folder / "model.safetensors"
    for path in folder.iterdir():
        if path not in (config, weights):
            path.unlink()
    model, processor = load_model(folder, inputs=True)
    assert processor is None and not model.training and "has no processor" in caplog.text
    assert load_model(folder, "given", inputs=True)[1] == "given"
    with pytest.raises(ModelError, match="the processor of"):
        load_model(folder)
    (folder / "preprocessor_config.json").write_text("{}")  # a part of one is damage
    with pytest.raises(ModelError, match="the processor of"):
        load_model(folder, inputs=True)
