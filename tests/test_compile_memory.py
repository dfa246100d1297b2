"""A compile frees replaced weights and keeps no large statistics in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from families import llava
from programs import changed_recipe

import qpcompile
from qpcompile.calibration import statistics
from qpcompile.compiled import CompiledVLM

WEIGHTS = "self_attn.q_proj", "mlp.down_proj"
SETTINGS = ("quantize.training.epochs=1", "quantize.training.samples=1")
JOINT = ("tokens.method=joint", "tokens.keep_of=mean", "tokens.keep=0.5", "tokens.compact_scored_layer=false")


def compiled(*settings: str, after: Any = None) -> tuple[CompiledVLM, dict[str, Any]]:
    """A LLaVA without other references, and weak references to some of its weights."""
    model, cases = llava()
    models = [model]
    weights = {
        name: weakref.ref(parameter)
        for name, parameter in model.named_parameters()
        if "language_model.layers.1." in name and name.removesuffix(".weight").endswith(WEIGHTS)
    }
    del model
    recipe = changed_recipe("w4a4kv4", *SETTINGS, *settings)
    made = qpcompile.compile(models.pop(), recipe, calibration=[cases["one"]], after=after and after(weights))
    return made, weights


def test_replaced_weights_are_gone() -> None:
    alive: dict[str, int] = {}

    def after(weights: dict[str, Any]) -> Any:
        def note(step: Any, _: Any) -> None:
            alive[step.name] = sum(weight() is not None for weight in weights.values())

        return note

    compiled(*JOINT, after=after)
    assert alive["calibrate"] == len(WEIGHTS)
    assert alive["fold_transforms"] == alive["quantize_weights"] == 0


@pytest.mark.parametrize("tie", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_replaced_head_is_gone(tie: bool) -> None:
    model, cases = llava(tie_word_embeddings=tie)
    models, head = [model], weakref.ref(model.get_parameter("lm_head.weight"))
    alive: dict[str, bool] = {}

    def after(step: Any, _: Any) -> None:
        alive[step.name] = head() is not None

    del model
    recipe = changed_recipe("w4a4kv4", "quantize.weights.solver=rtn", "quantize.transform=hadamard")
    made = qpcompile.compile(models.pop(), recipe, calibration=[cases["one"]], after=after)
    assert alive["quantize_weights"] and not alive["quantize_head"]
    assert made.weight_bytes("head") == 99 * (48 + 4) and ("embed" in made.program.graphs) is tie


@pytest.mark.slow
def test_statistics_in_files_give_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = compiled()
    monkeypatch.setattr(statistics, "LARGE", 0)
    given, _ = compiled()
    assert given.plan == expected.plan
    for name, graph in expected.program.graphs.items():
        tensors = given.program.graphs[name].module.state_dict()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in graph.module.state_dict().items())
