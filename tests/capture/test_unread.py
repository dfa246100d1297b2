"""Outputs of a tower that nothing reads are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llava, qwen2_5_vl
from programs import captured

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.ir.edit import layer_of
from qpcompile.ir.program import VISION
from qpcompile.recipe.recipe import Recipe

Model = tuple[Any, dict[str, Any], qpcompile.CompiledVLM]


@pytest.fixture(scope="module")
def compiled() -> Model:
    """(model, its cases, the model compiled without any change)."""
    model, cases = llava()
    return model, cases, qpcompile.compile(model, "none", calibration=[cases["one"]])


def test_layers_after_the_features_are_gone(compiled: Model) -> None:
    model, _, made = compiled
    graph = made.program.graphs[VISION]
    depth, chosen = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    assert graph.outputs == (f"hidden_states.{depth + 1 + chosen}",)
    assert {layer_of(node) for node in graph.nodes} - {None} == set(range(depth + 1 + chosen))
    assert not any("post_layernorm" in str(node.target) for node in graph.nodes)


def test_the_answer_is_the_models(compiled: Model) -> None:
    model, cases, made = compiled
    for case in cases.values():
        settings: Any = {**case, "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(made.generate(**settings), model.generate(**settings))


def test_what_is_read_stays() -> None:
    _, _, program = captured()
    assert program.graphs[VISION].outputs


@pytest.mark.slow
def test_the_towers_own_features_stay() -> None:
    model, cases = qwen2_5_vl()
    outputs = capture(model, cases["one"], Recipe.load("none")).graphs[VISION].outputs
    assert outputs, "the tower's own features"
