"""The small models with other habits have them: measured on a few prompts with the weights that are shipped."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

TESTBED = Path(__file__).parent / "testbed"
HABITS = ("late-reader", "background-norms", "sinks", "gemma")
LARGEST = 3_000_000  # bytes of a weights file
SEED, COUNT = 4, 12  # neither training's nor the results' questions


@functools.cache
def profiles() -> ModuleType:
    """tests/testbed/profiles.py; its folder is no package, and has modules with the names of libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TESTBED), *sys.path])
        return importlib.import_module("profiles")


@functools.cache
def profile(name: str) -> Any:
    """The profile of a testbed's model on the first samples."""
    model, processor = profiles().load(TESTBED / name)
    return profiles().measure(model, processor, "llava", SEED, COUNT)


@pytest.mark.parametrize("name", HABITS)
def test_weights_are_small_and_right(name: str) -> None:
    assert (TESTBED / name / "model.safetensors").stat().st_size <= LARGEST
    assert profile(name).accuracy >= 0.8


def test_the_late_reader_reads_after_its_first_layers_and_llava_in_them() -> None:
    late, llava = profile("late-reader"), profile("llava")
    assert (late.cut[:4] <= late.accuracy - 0.4).all()  # before the decoder and after layers 0 to 2
    assert (late.cut[5:] >= late.accuracy - 0.2).all()  # after layers 4 to 7
    assert llava.cut[1] >= llava.accuracy - 0.15


def test_large_norms_mark_background_and_in_llava_objects() -> None:
    other, llava = profile("background-norms"), profile("llava")
    assert (other.object_auc[:4] < 0.2).all() and (llava.object_auc[:4] > 0.65).all()


def test_sinks_have_large_norms_and_draw_attention() -> None:
    sinks, llava = profile("sinks"), profile("llava")
    assert sinks.tower_residual.max() > 8 > 4 > llava.tower_residual.max()
    assert sinks.tower_attention[-1] > 0.05 > llava.tower_attention.max() and sinks.sink_on_object == 0
    assert sinks.residual[2:].min() > 30 > llava.residual.max()
    assert np.median(sinks.first_attention[2:]) > 0.25 > 0.15 > llava.first_attention.max()


def test_gemma_has_its_norms_and_grouped_queries() -> None:
    model, _ = profiles().load(TESTBED / "gemma")
    text = model.config.text_config
    assert text.model_type == "gemma" and text.num_attention_heads > text.num_key_value_heads > 0
    with safe_open(TESTBED / "gemma" / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys() if name.endswith("input_layernorm.weight")]  # noqa: SIM118
    norms = [layer.input_layernorm for layer in profiles().decoder_layers(model)]
    assert len(stored) == len(norms)
    for weight, norm in zip(stored, norms, strict=True):
        ones = np.ones(text.hidden_size, dtype=np.float32)
        given = norm(weight.new_tensor(ones).float()).detach().numpy()
        np.testing.assert_allclose(given, 1 + weight.float().numpy(), rtol=1e-3, atol=1e-3)
