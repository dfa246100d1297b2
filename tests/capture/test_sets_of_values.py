"""Components whose code reads values: a graph per set of values, and transformers' code for others."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from qpcompile.capture.record import Call, Recording, _watch
from qpcompile.capture.sets_of_values import MOST_SETS, graphs_of_values
from qpcompile.capture.trace import check_sizes, trace, trace_values
from qpcompile.errors import CaptureError
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text
from qpcompile.runtime.fixed_values import VALUES, digest_of, fixed, of_call, said, varying

WHY = CaptureError("it cannot be traced", where="tower", do="report it")


class Tower(nn.Module):
    """Loops over pictures by their sizes, drops what a mask hides, and adds positions that it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, pixel_values: torch.Tensor, grid: torch.Tensor, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        parts = []
        for picture, (height, width) in zip(pixel_values.split(grid.prod(dim=-1).tolist()), grid.tolist(), strict=True):
            rows = torch.arange(height).repeat_interleave(width)
            parts.append(self.inner(picture) + self.table[rows] + self.table[:width].mean(dim=0))
        kept = torch.cat(parts)[~hidden]
        counts = torch.bincount(torch.arange(len(hidden))[hidden] % 2, minlength=2)
        return kept * 2 if int(counts[0]) > 1 else torch.repeat_interleave(kept, counts.new_tensor([2] * len(kept)), 0)


class Reading(nn.Module):
    """Takes a branch by what the pictures hold, which no graph can know."""

    def forward(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return pixel_values * 2 if bool(pixel_values.sum() > 0) else pixel_values


def call_of(tower: nn.Module, *sizes: tuple[int, int], hidden: int = 1, seed: int = 0) -> Call:
    torch.manual_seed(seed)
    count = sum(height * width for height, width in sizes)
    inputs = {
        "pixel_values": torch.randn(count, 4),
        "grid": torch.tensor(sizes),
        "hidden": torch.arange(count) % 4 >= 4 - hidden,
    }
    with torch.no_grad():
        return Call("vision", inputs, tower(**inputs))


def tower() -> Tower:
    torch.manual_seed(1)
    return Tower().eval().requires_grad_(False)


def test_what_is_known_is_not_in_the_graph() -> None:
    module = tower()
    graph = trace_values("vision", "tower", module, call_of(module, (2, 3), (1, 2)))
    text = graph_text(graph)
    assert graph.inputs == ("pixel_values",)
    check_sizes(graph)
    for absent in ("arange", "repeat_interleave", "prod", "local_scalar", "bincount", "nonzero"):
        assert absent not in text
    assert text.count("aten::linear") == 2  # the loop over pictures is unrolled
    other = call_of(module, (2, 3), (1, 2), seed=3)
    with torch.no_grad():
        (found,) = graph({"pixel_values": other.inputs["pixel_values"]}).values()
    assert torch.allclose(found, other.output) and not torch.equal(found, call_of(module, (2, 3), (1, 2)).output)


def test_the_same_code_has_no_graph_for_all_values() -> None:
    module = tower()
    with pytest.raises(CaptureError, match=r"cannot be traced|depends on values"):
        check_sizes(trace("vision", "tower", module, call_of(module, (2, 3), (1, 2))))


def test_a_digest_is_of_values_and_shapes() -> None:
    module = tower()
    inputs = call_of(module, (2, 3)).inputs
    key = digest_of(of_call(inputs))
    assert key == digest_of(of_call({**inputs, "pixel_values": inputs["pixel_values"].double() + 1}))
    assert key == digest_of(of_call({**inputs, "grid": inputs["grid"].int(), "return_dict": True, "none": None}))
    others: list[dict[str, Any]] = [
        {"grid": torch.tensor([[3, 2]])},
        {"grid": torch.tensor([2, 3])},
        {"hidden": ~inputs["hidden"]},
        {"hidden": inputs["hidden"].long()},
        {"pixel_values": torch.zeros(7, 4)},
        {"merged": (2, 3)},
        {"output_hidden_states": [-2, -1]},
        {"return_dict": False},
    ]
    keys = [digest_of(of_call({**inputs, **other})) for other in others]
    assert key not in keys and len(set(keys)) == len(keys)


def test_arguments_with_floating_point_tensors_are_inputs() -> None:
    inputs = {"features": [torch.zeros(2)], "sizes": [(4, 2)], "grid": torch.tensor([[1, 2]]), "scale": 0.5}
    assert varying(inputs).keys() == {"features"} and fixed(inputs).keys() == {"sizes", "grid", "scale"}
    assert said(inputs) == "features.length=1, features.0 [2], grid=[[1, 2]], scale=0.5, sizes.length=1, " + (
        "sizes.0.length=2, sizes.0.0=4, sizes.0.1=2"
    )


def test_each_set_of_values_has_one_graph_on_the_same_weights() -> None:
    module = tower()
    sizes = [(2, 3), (2, 3), (3, 2), (1, 4), (2, 2), (5, 1)]
    graphs, left = graphs_of_values("vision", "tower", module, [call_of(module, size) for size in sizes], WHY)
    assert list(graphs) == ["vision", "vision.1", "vision.2", "vision.3"] and len(graphs) == MOST_SETS
    assert len({graph.constants[VALUES] for graph in graphs.values()}) == MOST_SETS
    held = {weight(graph).data_ptr() for graph in graphs.values()}
    assert held == {module.inner.weight.data_ptr()}
    assert "it cannot be traced (tower)" in left.reason and "grid=[[3, 2]]" in left.reason


def weight(graph: Graph) -> torch.Tensor:
    return graph.module.get_parameter("inner.weight")


def test_what_reads_pictures_stays_with_both_reasons(caplog: pytest.LogCaptureFixture) -> None:
    module = Reading()
    inputs = {"pixel_values": torch.ones(2, 4), "grid": torch.tensor([[1, 2]])}
    with caplog.at_level(logging.WARNING, logger="qpcompile"):
        graphs, left = graphs_of_values("vision", "tower", module, [Call("vision", inputs, module(**inputs))], WHY)
    assert not graphs and "it cannot be traced (tower); for one set of values alone: " in left.reason
    assert left.reason in caplog.text


def test_a_component_that_takes_the_prompt_has_no_graph_per_prompt() -> None:
    module = tower()
    call = call_of(module, (2, 3))
    call.inputs["input_ids"] = torch.tensor([[1, 2]])
    assert graphs_of_values("vision", "tower", module, [call], WHY)[0] == {}


def test_weights_that_code_around_a_component_reads_are_noted() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model = nn.Sequential(inner, nn.Linear(2, 2))
    recording = Recording({"vision": "0"})
    with ExitStack() as stack:
        _watch(stack, recording, "0", inner)
        model(torch.ones(1, 2))
        assert not recording.outside
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3))
        inner[1](torch.ones(1, 2))  # as a host does that normalises again what a tower returns
    assert recording.outside == {"0.1.weight", "0.1.bias"}
    inner[0](torch.ones(1, 2))
    assert recording.outside == {"0.1.weight", "0.1.bias"}
