"""The zoo: configurations shrink by their keys, and every family is recorded or refused with an error of ours."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from models import build, names
from shape import Shape
from shrink import per_layer, shrunk

from qpcompile.capture.capture import recorded
from qpcompile.cli import families
from qpcompile.errors import QPCompileError

# In the default suite a sixth of the families, another one every day; all with -m slow.
PARTS = 6
TODAY = [name for place, name in enumerate(names()) if place % PARTS == date.today().toordinal() % PARTS]
ALL = [pytest.param(name, marks=[] if name in TODAY else pytest.mark.slow) for name in names()]
# Packages that a tower of these needs and that are not installed with this project.
MISSING = (ImportError,)


def test_a_configuration_shrinks_by_its_keys() -> None:
    shape = Shape(layers=5, tower_layers=2, special=77)
    config = shrunk(transformers.LlavaConfig, {"image_seq_length": 16, "vision_config.patch_size": 4}, shape)
    assert config.text_config.num_hidden_layers == 5 and config.vision_config.num_hidden_layers == 2
    assert config.vision_config.patch_size == 4 and config.image_seq_length == 16
    assert config.image_token_id == 77


def test_sections_of_rotary_frequencies_add_up_to_those_of_a_head() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    for head, sections in ((16, [3, 3, 2]), (24, [4, 4, 4]), (32, [6, 6, 4])):
        shape = Shape(width=4 * head, head=head)
        config = shrunk(transformers.Ernie4_5_VLMoeConfig, {"text_config.rope_parameters": rope}, shape)
        assert config.text_config.rope_parameters["mrope_section"] == sections


def test_layers_of_every_kind_stay() -> None:
    assert per_layer(["a"] * 5 + ["b"] + ["a"] * 5, 3) == ["a", "b", "a"]
    assert per_layer(["a", "b", "c", "a"], 3) == ["a", "b", "c"]
    assert per_layer(["a"] * 9, 3) == ["a"] * 3


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_recorded_or_refused(name: str) -> None:
    try:
        model, cases = build(name)
    except (*MISSING, TypeError, AttributeError) as error:
        pytest.skip(f"transformers does not build it: {type(error).__name__}")
    try:
        _, recording = recorded(model, cases["one"])
    except QPCompileError as error:
        assert error.where and error.do, error
        return
    call = recording.first("language", 1)
    assert call is not None and call.inputs["inputs_embeds"].shape[:2] == (2, 1)


def test_the_table_that_ships_is_the_page() -> None:
    table = families.shipped()
    page = Path(__file__).resolve().parents[2] / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == families.page(table), "run `make test-zoo`"
    assert set(table["families"]) <= set(names()) and "transformers" in table["versions"]
    text = "\n".join(families.lines(table))
    assert "llava " in text and "captured: " in text
