"""A decoder that loops over chunks of tokens is refused: its graph has the chunks of the traced prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llava
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qpcompile.capture.capture import capture, longer_by, recorded
from qpcompile.capture.longer import first_refused
from qpcompile.errors import CaptureError
from qpcompile.ir.program import PREFILL
from qpcompile.recipe.recipe import Recipe

NONE = Recipe.load("none")
CHUNK = 64


def in_chunks(x: torch.Tensor) -> torch.Tensor:
    """Sums of f[B, S, C] over the tokens so far of each chunk, and of the chunks before."""
    tokens = x.shape[1]
    x = torch.nn.functional.pad(x, (0, 0, 0, (CHUNK - tokens % CHUNK) % CHUNK))
    parts = x.reshape(x.shape[0], -1, CHUNK, x.shape[2])
    rows, before = [], torch.zeros_like(x[:, :1])
    for place in range(x.shape[1] // CHUNK):
        rows.append(parts[:, place].cumsum(dim=1) + before)
        before = rows[-1][:, -1:]
    return torch.cat(rows, dim=1)[:, :tokens]


def changed(monkeypatch: pytest.MonkeyPatch, more: Any) -> None:
    """Layers of Llama whose results have something added to them."""
    original = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return original(self, hidden_states, **kwargs) + more(hidden_states)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


def test_a_loop_over_chunks_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases = llava()
    changed(monkeypatch, in_chunks)
    with pytest.raises(
        CaptureError, match=f"do not hold for prompts of other lengths: with {CHUNK + 1} tokens"
    ) as error:
        capture(model, cases["one"], NONE)
    assert error.value.where is not None and "more(hidden_states)" in error.value.where


def test_a_prompt_is_traced_with_three_chunks_of_layers_that_have_some() -> None:
    model, cases = llava()
    tokens = cases["one"]["input_ids"].shape[1]
    decoder = model.model.language_model
    assert longer_by(decoder, cases["one"]) == 1
    decoder.layers[1].mlp.chunk_size = tokens
    assert longer_by(decoder, cases["one"]) == tokens + 1
    prompt, recording = recorded(model, cases["one"], tokens + 1)
    assert prompt["input_ids"].shape == prompt["attention_mask"].shape == (2, 2 * tokens + 1)
    assert prompt["attention_mask"].sum().item() == 2 * (2 * tokens + 1) - 1  # one token of padding
    call = recording.first("language")
    assert call is not None and call.inputs["inputs_embeds"].shape[1] == 2 * tokens + 1


def test_a_branch_of_no_effect_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases = llava()
    changed(monkeypatch, lambda x: x * 0.5 if x.shape[1] <= CHUNK else x / 2)
    program = capture(model, cases["one"], NONE)
    assert first_refused(program.graphs[PREFILL]) == CHUNK + 1
