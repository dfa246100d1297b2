"""What crosses a point of a graph, and what replaces it after a cut."""

from __future__ import annotations

import pytest
import torch
from programs import run, traced
from torch import Tensor, nn

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, call, calls, clone, tidy
from qpcompile.ir.liveness import Selection, crossings, gather, mask_dead, reduce_tokens
from qpcompile.ir.names import names
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import add_input, new_size, propagate, value


class Mixed(nn.Module):
    """All kinds of values live at the sine: hidden states, a table without a batch, a mask, sizes, a constant."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = x.shape[0], x.shape[1]
        table = torch.arange(length)[None, :, None] * 0.5
        early = torch.relu(x)
        y = torch.sin(early) + torch.cos(table)
        scores = (y @ y.transpose(1, 2))[:, None].masked_fill(~mask, -1e9)
        return scores.softmax(-1).view(rows, 1, length, length) @ y[:, None], early


class Flat(nn.Module):
    """Tokens of all rows in one list, as layers of experts have them, and sizes computed from their number."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape[0], x.shape[1]
        flat = torch.relu(x).view(-1, x.shape[2])
        return torch.sin(flat).view(rows, length, -1) + torch.arange(length * 2 + rows).sum()


class Numbered(nn.Module):
    """Numbers of tokens that are the same for every row until they are expanded; a top-k among at most four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape[0], x.shape[1]
        places = torch.arange(length) + 1
        y = torch.sin(x)
        scale = torch.log(places.float()).view(1, length, 1).expand(rows, length, 1)
        return torch.topk(y * scale, min(4, length), dim=1).values


class Broadcast(nn.Module):
    """Numbers of tokens without a batch axis, which meet the hidden states as they are."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[:, None] + 1
        return torch.sin(x) * places


class Squared(nn.Module):
    """A size that depends on the length in an unusual way."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) + torch.arange(x.shape[1] ** 2).sum()


@pytest.fixture(scope="module")
def mixed() -> Graph:
    inputs = {"x": torch.ones(2, 5, 4), "mask": torch.ones(2, 1, 5, 5, dtype=torch.bool)}
    return traced(Mixed(), inputs, ("y", "early"), axes={"x": (0, 1), "mask": (0, 2, 3)})


def cut(graph: Graph) -> None:
    """Drop tokens right before the sine, by the new inputs `index` and `alive`."""
    point = next(calls(graph, aten.sin.default))
    batch, length = value(graph.placeholder("x")).shape[:2]
    slots = new_size(graph, "slots", 3)
    index = add_input(graph, "index", (batch, slots), torch.int64)
    alive = add_input(graph, "alive", (batch, slots), torch.bool)
    count, rows = (call(graph, point, aten.sym_size.int, index, axis) for axis in (1, 0))
    reduce_tokens(graph, point, [(length, Selection(index, alive, count, rows))], skip=[index, alive])
    propagate(graph, point)
    tidy(graph)


def test_crossings_are_what_is_read_behind_the_point(mixed: Graph) -> None:
    point = next(calls(mixed, aten.sin.default))
    found = {crossing.node.name: [reader.name for reader in crossing.readers] for crossing in crossings(mixed, point)}
    assert found["mask"] == ["bitwise_not"] and found["relu"] == ["sin"]
    assert "x" not in found, "it is not read behind the point"
    assert all("output" not in readers for readers in found.values())
    order = mixed.nodes.index(point)
    assert {node.name for node in mixed.nodes[:order]} >= set(found)


def test_reduced_graph_computes_on_the_kept_tokens(mixed: Graph) -> None:
    graph = clone(mixed)
    cut(graph)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 4, generator=made)
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7).contiguous()
    index = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5], [0, 1, 2, 3]])
    alive = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    found = run(graph, x=x, mask=mask, index=index, alive=alive)
    assert torch.equal(found["early"], torch.relu(x)), "what is returned from before the cut stays whole"
    for row in range(3):
        kept = index[row]
        y = torch.sin(torch.relu(x[row, kept])) + torch.cos(kept[:, None] * 0.5)
        open_keys = mask[row, 0][kept][:, kept] & alive[row]
        expected = (y @ y.T).masked_fill(~open_keys, -1e9).softmax(-1) @ y
        assert torch.allclose(found["y"][row, 0], expected, atol=1e-6)


def test_flat_tokens_and_sizes_follow_the_cut() -> None:
    graph = traced(Flat(), {"x": torch.ones(2, 5, 4)}, ("y",), axes={"x": (0, 1)})
    cut(graph)
    x, index = torch.randn(3, 7, 4), torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5], [0, 1, 2, 3]])
    found = run(graph, x=x, index=index, alive=torch.ones(3, 4, dtype=torch.bool))["y"]
    kept = torch.sin(torch.relu(x)).gather(1, index[..., None].expand(-1, -1, 4))
    assert torch.allclose(found, kept + torch.arange(4 * 2 + 3).sum())


def test_values_without_a_batch_axis_get_one_before_the_cut() -> None:
    graph = traced(Numbered(), {"x": torch.ones(2, 5, 4)}, ("y",), axes={"x": (0, 1)})
    cut(graph)
    nodes = graph.nodes
    point = nodes.index(next(calls(graph, aten.sin.default)))
    assert nodes.index(next(calls(graph, aten.log.default))) < point
    assert nodes.index(next(calls(graph, aten.expand.default))) < point
    x, index = torch.randn(3, 7, 4), torch.tensor([[0, 2, 3], [1, 2, 4], [4, 5, 6]])
    found = run(graph, x=x, index=index, alive=torch.ones(3, 3, dtype=torch.bool))["y"]
    kept = torch.sin(x).gather(1, index[..., None].expand(-1, -1, 4)) * torch.log(index + 1.0)[..., None]
    assert torch.equal(found, kept.sort(dim=1, descending=True).values)


def test_value_without_a_batch_axis_that_meets_hidden_states_is_refused() -> None:
    graph = traced(Broadcast(), {"x": torch.ones(2, 5, 4)}, ("y",), axes={"x": (0, 1)})
    with pytest.raises(PlanError, match="has no batch axis"):
        cut(graph)


def test_size_that_cannot_be_replaced_is_refused() -> None:
    graph = traced(Squared(), {"x": torch.ones(2, 5, 4)})
    point = next(calls(graph, aten.arange.default))
    batch, length = value(graph.placeholder("x")).shape[:2]
    index = add_input(graph, "index", (batch, new_size(graph, "slots", 3)), torch.int64)
    count, rows = (call(graph, point, aten.sym_size.int, index, axis) for axis in (1, 0))
    with pytest.raises(PlanError, match=r"is live there and its size is s\d+\*\*2") as error:
        reduce_tokens(graph, point, [(length, Selection(index, index, count, rows))], skip=[index])
    assert error.value.where is not None and error.value.where.startswith("prefill, before arange")


def test_tensor_without_a_batch_axis_is_refused(mixed: Graph) -> None:
    graph = clone(mixed)
    point = next(calls(graph, aten.sin.default))
    batch, length = value(graph.placeholder("x")).shape[:2]
    index = add_input(graph, "index", (batch, new_size(graph, "slots", 3)), torch.int64)
    flat = add_input(graph, "flat", (length,), torch.float32)
    count, rows = (call(graph, point, aten.sym_size.int, index, axis) for axis in (1, 0))
    with pytest.raises(PlanError, match="has no batch axis"):
        gather(graph, point, flat, [0], Selection(index, index, count, rows))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_dead_slots_are_closed_in_every_kind_of_mask(mixed: Graph, dtype: torch.dtype) -> None:
    graph = clone(mixed)
    point = next(calls(graph, aten.sin.default))
    batch, length = value(graph.placeholder("x")).shape[:2]
    given = add_input(graph, "given", (batch, 1, length, length), dtype)
    alive = add_input(graph, "alive", (batch, length), torch.bool)
    closed = mask_dead(graph, point, given, alive, dtype)
    graph.output_node.args = ((closed,),)
    graph.outputs = names(("closed",))
    tidy(graph)
    open_mask = torch.ones(2, 1, 3, 3, dtype=dtype) if dtype == torch.bool else torch.zeros(2, 1, 3, 3, dtype=dtype)
    lives = torch.tensor([[True, False, True], [True, True, True]])
    x, mask = torch.ones(2, 3, 4), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    found = run(graph, x=x, mask=mask, given=open_mask, alive=lives)["closed"]
    assert found.dtype == dtype
    assert torch.equal(found[1], open_mask[1]) and torch.equal(found[0, :, :, ::2], open_mask[0, :, :, ::2])
    assert (found[0, 0, :, 1] == (False if dtype == torch.bool else torch.finfo(dtype).min)).all()
