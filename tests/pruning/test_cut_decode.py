"""Decode on caches whose lengths differ by layer."""

from __future__ import annotations

import pytest
import torch
from programs import run
from toy_decoder import HIDDEN, KV_HEADS, WIDTH, Decode, Prefill, cache_names, decode_graph

from qpcompile.errors import PlanError
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import expression, value
from qpcompile.passes.canonicalize import canonicalize
from qpcompile.pruning.cut_decode import cut_decode


def lengths(graph: Graph) -> list[str]:
    """The token axis of each cached key, the first layer's first."""
    return [str(expression(value(graph.placeholder(f"past_key_values.{layer}.key")).shape[2])) for layer in (0, 1)]


@pytest.mark.parametrize(
    ("cuts", "offset", "stages"),
    [([0], 0, [0, 0]), ([0], 1, [None, 0]), ([0, 1], 0, [0, 1]), ([1], 0, [None, 1])],
)
def test_each_layer_runs_on_what_its_cut_left(cuts: list[int], offset: int, stages: list[int | None]) -> None:
    graph = decode_graph()
    canonicalize(graph)  # one mask for both layers, as everywhere in the pipeline
    before = graph.inputs
    cut_decode(graph, cuts, offset)
    extra = [f"{kind}.{cut}" for cut in cuts for kind in ("kept", "alive")]
    assert graph.inputs == (*before, "tokens_seen", *extra)
    assert (lengths(graph)[0] == lengths(graph)[1]) == (stages[0] == stages[1])

    made = torch.Generator().manual_seed(0)
    kept = {0: torch.tensor([[0, 2, 3, 5, 6, 8], [1, 2, 4, 5, 7, 8]]), 1: torch.tensor([[2, 5, 8], [1, 7, 8]])}
    alive = {0: torch.ones(2, 6, dtype=torch.bool), 1: torch.ones(2, 3, dtype=torch.bool)}
    alive[0][1, 3] = alive[1][0, 0] = False
    whole = {name: torch.randn(2, KV_HEADS, 8, WIDTH, generator=made) for name in cache_names(2)}
    new, mask = torch.randn(2, 1, HIDDEN, generator=made), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 0] = False
    feeds: dict[str, torch.Tensor] = {"inputs_embeds": new, "attention_mask": mask, "tokens_seen": torch.arange(8)}
    feeds |= {f"kept_{cut}": kept[cut] for cut in cuts} | {f"alive_{cut}": alive[cut] for cut in cuts}
    opened = []
    for layer, stage in enumerate(stages):
        seen = mask.clone()
        if stage is not None:
            seen = torch.zeros_like(mask)
            for row in range(2):
                seen[row, kept[stage][row][alive[stage][row]]] = True
            seen &= mask
        opened.append(seen[:, None, None])
        for part in ("key", "value"):
            cached = whole[f"past_key_values.{layer}.{part}"]
            if stage is not None:
                index = kept[stage][:, None, :-1, None].expand(-1, KV_HEADS, -1, WIDTH)
                cached = cached.gather(2, index)
            feeds[f"past_key_values_{layer}_{part}"] = cached
    found = run(graph, **feeds)

    decoder, x = Decode(Prefill()), new
    with torch.no_grad():
        for layer, seen in enumerate(opened):
            past = (whole[f"past_key_values.{layer}.key"], whole[f"past_key_values.{layer}.value"])
            x, *_ = decoder.layers[layer](x, seen, past)
    assert torch.allclose(found["hidden"], x, atol=1e-6)


def test_no_layer_behind_the_cut() -> None:
    with pytest.raises(PlanError, match="there is no layer after it"):
        cut_decode(decode_graph(), [1], 1)
