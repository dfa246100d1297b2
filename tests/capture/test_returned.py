"""Graphs take embeddings: what only a call with ids returns is no output of theirs."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from qpcompile.capture.record import Call
from qpcompile.capture.trace import trace


class Decoder(nn.Module):
    """Returns beside its states a mask, if it made one of ids."""

    def forward(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None
    ) -> BaseModelOutputWithPast:
        if input_ids is not None:
            mask = torch.ones_like(input_ids)
            return BaseModelOutputWithPast(last_hidden_state=input_ids[..., None] * 2.0, attentions=(mask,))
        assert inputs_embeds is not None
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds * 2.0)


def test_outputs_of_a_call_with_ids_that_embeddings_have_not() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    call = Call("language", {"inputs_embeds": ids[..., None].float()}, Decoder()(ids))
    graph = trace("prefill", "decoder", Decoder(), call)
    assert graph.outputs == ("last_hidden_state",) and graph.returns == {"last_hidden_state": "last_hidden_state"}
