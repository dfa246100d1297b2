"""The rows of a tower that become visual tokens, derived from a recorded run; none if the host does more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.capture.record import Call, Recording
from qpcompile.capture.visual_path import visual_path
from qpcompile.pruning.visual_rows import OUTPUT, SKIPPED

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
