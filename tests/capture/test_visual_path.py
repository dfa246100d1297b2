"""The rows of a tower that become visual tokens, derived from a recorded run; none if the host does more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_states import CHANNELS, states_prefill

from qpcompile.capture.record import Call, Recording
from qpcompile.capture.visual_path import rows_of_states, visual_path
from qpcompile.pruning.visual_rows import OUTPUT, SKIPPED
from qpcompile.runtime.prepare import PICTURES, PROMPT, STATES_OF

IMAGE = 9
IDS = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2], [0, 1, 3, IMAGE, 2]])


def recorded(towers: list[dict[str, Tensor]], projectors: list[tuple[Tensor, Tensor]], visual: Tensor) -> Recording:
    """A run whose visual embeddings are `visual: f[4, 3]`."""
    embeds = torch.randn(*IDS.shape, 3)
    embeds[IDS == IMAGE] = visual
    calls = [Call("vision", {}, output) for output in towers]
    calls += [Call("projector", {"image_features": taken}, output) for taken, output in projectors]
    return Recording({}, [*calls, Call("language", {"inputs_embeds": embeds})])


def path(recording: Recording) -> dict[str, Any]:
    return visual_path(recording, IDS, torch.tensor([IMAGE]))


def test_a_class_token_is_left_out_before_the_projector() -> None:
    outputs = {"last_hidden_state": torch.randn(2, 3, 5), "hidden_states.1": torch.randn(2, 3, 5)}
    projected = torch.randn(2, 2, 3)
    found = path(recorded([outputs], [(outputs["hidden_states.1"][:, 1:], projected)], projected.flatten(0, 1)))
    assert found == {OUTPUT: "hidden_states.1", SKIPPED: 1}


def test_a_tower_that_projects_itself_is_scaled_or_not() -> None:
    outputs = {"last_hidden_state": torch.randn(8, 3), "pooler_output": torch.randn(4, 3)}
    for factor in (1.0, 0.5):
        found = path(recorded([outputs], [], factor * outputs["pooler_output"]))
        assert found == {OUTPUT: "pooler_output", SKIPPED: 0}


def test_one_call_per_picture() -> None:
    towers = [{"pooler_output": torch.randn(3, 3)}, {"pooler_output": torch.randn(1, 3)}]
    assert path(recorded(towers, [], torch.cat([tower["pooler_output"] for tower in towers]))) == {
        OUTPUT: "pooler_output",
        SKIPPED: 0,
    }


@pytest.mark.parametrize("change", ["order", "count", "taken", "calls"])
def test_no_path(change: str) -> None:
    features, projected = torch.randn(2, 2, 5), torch.randn(2, 2, 3)
    towers, visual, taken = [{"last_hidden_state": features}], projected.flatten(0, 1), features
    if change == "order":
        visual = visual.flip(0)
    elif change == "count":
        projected = projected[:, :1]
    elif change == "taken":
        taken = features.flip(1)
    else:
        towers = towers * 2
    assert path(recorded(towers, [(taken, projected)], visual)) == {}


def test_a_decoder_without_embeddings_or_of_another_length_has_none() -> None:
    recording = recorded([{"pooler_output": torch.randn(4, 3)}], [], torch.randn(4, 3))
    assert visual_path(recording, IDS[:, 1:], torch.tensor([IMAGE])) == {}
    recording.calls[-1].inputs.clear()
    assert path(recording) == {}


STATES = torch.randn(2, 5, CHANNELS)
DECODED = {"decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}


def states_of(prompt: dict[str, Tensor], *calls: Call) -> str | None:
    """What the states of a decoder are taken to be of."""
    recording = Recording({}, [*calls, Call("language", {"inputs_embeds": torch.ones(2, 3, 8), "states": STATES})])
    return rows_of_states(states_prefill(None), recording, prompt, torch.tensor([IMAGE])).get(STATES_OF)


def test_states_that_a_tower_made_are_of_pictures() -> None:
    parts = [Call("vision", {}, {"pooled": torch.randn(1, CHANNELS), "last": part}) for part in STATES]
    assert states_of({"input_ids": IDS}, *parts) == PICTURES
    assert states_of({"input_ids": IDS}, *parts[:1]) is None
    assert states_of({"input_ids": IDS}, *reversed(parts)) is None
    assert states_of({"input_ids": IDS}, Call("projector", {}, STATES.view(10, CHANNELS))) == PICTURES


def test_states_of_an_encoder_are_of_its_prompt() -> None:
    assert states_of({"input_ids": IDS} | DECODED) == PROMPT
    # An encoder of prompt and pictures gives the states themselves.
    encoder = Call("vision", {"input_ids": IDS}, {"last_hidden_state": STATES})
    assert states_of({"input_ids": IDS} | DECODED, encoder) == PROMPT


def test_states_are_of_pictures_where_there_is_nothing_else() -> None:
    assert states_of(DECODED) == PICTURES


@pytest.mark.parametrize("ids", [IDS[:, 1:], torch.ones_like(IDS)])
def test_states_of_unknown_rows(ids: Tensor) -> None:
    """A row for each token is missing, or no token is of a picture."""
    assert states_of({"input_ids": ids} | DECODED) is None
