"""Zeros for the inputs of pictures in prompts without any."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import program_of, traced
from torch import Tensor, nn

from qpcompile.capture import text_alone
from qpcompile.capture.capture import capture
from qpcompile.capture.logits import logits_apart
from qpcompile.errors import CalibrationError
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.prepare import ABSENT, PICTURES_AT, absent_inputs

EMBEDS = torch.ones(3, 4, 8)


class Decoder(nn.Module):
    """A decoder that reads features of pictures under a mask of tokens."""

    def forward(self, inputs_embeds: Tensor, seen: Tensor, features: Tensor) -> Tensor:
        return inputs_embeds * seen + features.view(len(inputs_embeds), -1, 8).sum(dim=1, keepdim=True)


def decoder(count: int | None) -> Graph:
    inputs = {"inputs_embeds": torch.ones(2, 5, 8), "seen": torch.ones(2, 5, 1), "features": torch.ones(6, 7, 8)}
    graph = traced(Decoder(), inputs)
    graph.constants |= {} if count is None else {f"{ABSENT}.seen": count, f"{ABSENT}.features": count}
    return graph


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (1, 3)])
def test_unknown_sizes_are_of_so_many_rows(count: int, rows: int) -> None:
    found = absent_inputs(decoder(count), {"inputs_embeds": EMBEDS}, 0)
    assert found["seen"].shape == (3, 4, 1) and found["features"].shape == (rows, count, 8)
    assert not any(bool(tensor.any()) for tensor in found.values())


def test_nothing_stands_for_what_was_not_told_or_is_there_in_part() -> None:
    assert absent_inputs(decoder(None), {"inputs_embeds": EMBEDS}, 0) == {}
    assert absent_inputs(decoder(1), {"inputs_embeds": EMBEDS, "seen": torch.ones(3, 4, 1)}, 0) == {}


class Marking(nn.Module):
    """A decoder that is told which tokens stand for pictures, by a mask whose sizes a trace does not tie to tokens."""

    def forward(self, inputs_embeds: Tensor, image_embeds_position_mask: Tensor) -> Tensor:
        return inputs_embeds + image_embeds_position_mask.sum()


def test_a_mask_of_picture_tokens_has_an_entry_for_each_token() -> None:
    graph = traced(Marking(), {"inputs_embeds": torch.ones(2, 5, 8), PICTURES_AT: torch.ones(3, 6, dtype=torch.long)})
    graph.constants |= {f"{ABSENT}.{PICTURES_AT}": 0}
    (found,) = absent_inputs(graph, {"inputs_embeds": EMBEDS}, 0).values()
    assert found.shape == (3, 4) and found.dtype == torch.int64 and not bool(found.any())


@pytest.mark.parametrize(
    ("half", "distances", "told"),
    [
        (False, {0: 1e-4}, 0),
        (False, {0: 2e-3, 1: 1e-4}, 1),
        (False, {0: 2e-3, 1: 2e-3}, None),  # neither
        (True, {0: 0.2, 1: 0.04}, 1),  # where types of 16 bits round, the nearer
        (True, {0: 0.04, 1: 0.2}, 0),
        (True, {0: 0.3, 1: float("inf")}, None),
    ],
)
def test_the_rows_that_give_the_models_answer_are_told(
    half: bool, distances: dict[int, float], told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def far(program: Program, *_: object) -> float:
        tried.append(program.graphs[PREFILL].constants[f"{ABSENT}.features"])
        return distances[tried[-1]]

    monkeypatch.setattr(text_alone, "far_from_model", far)
    host = nn.Linear(1, 1, dtype=torch.bfloat16 if half else torch.float32)
    host.dtype = host.weight.dtype  # type: ignore[assignment]
    program = dataclasses.replace(program_of(decoder(None)), host=host)
    model = SimpleNamespace(config=SimpleNamespace(image_token_id=9), generate=lambda **_: answer)
    answer = SimpleNamespace(logits=(torch.zeros(2, 5),) * 2)
    text_alone.learn_absent(program, model, {"input_ids": torch.tensor([[1, 9, 2]])})
    assert tried == list(distances)
    assert program.graphs[PREFILL].constants.get(f"{ABSENT}.features") == told


@pytest.mark.parametrize(("found", "far"), [([[[0.0, 1.0]]], 0.0), ([[[1.0, 2.0]]], 2.0), ([[[0.0]]], float("inf"))])
def test_logits_are_compared_by_their_spread(found: list[list[list[float]]], far: float) -> None:
    assert logits_apart(torch.tensor(found), torch.tensor([[[0.0, 1.0]]])) == far


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("granite4_vision", 0), ("mllama", 1), ("kosmos-2.5", 0)])
def test_text_alone_is_answered_as_by_the_model(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "zoo"), *sys.path])
    from models import build  # pyright: ignore[reportMissingImports]

    model, cases = build(name)
    program = capture(model, cases["one"], Recipe.load("none"))
    told = {key: value for key, value in program.graphs[PREFILL].constants.items() if key.startswith(f"{ABSENT}.")}
    assert told and set(told.values()) == {count}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with Machine(program) as machine:
        found = machine.generate(**cases["text"], **options)
    assert torch.equal(found, model.generate(**cases["text"], **options))  # type: ignore[operator]
    for graph in program.language:
        graph.constants = {key: value for key, value in graph.constants.items() if key not in told}
    with Machine(program) as machine, pytest.raises(CalibrationError, match="does not have"):
        machine.generate(**cases["text"], **options)
