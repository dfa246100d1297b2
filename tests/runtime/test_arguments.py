"""A component refuses arguments that its graph was not traced with; nothing is dropped silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import captured, fresh, traced
from transformers import DynamicCache

from qpcompile.errors import CaptureError, InputError
from qpcompile.ir.names import names
from qpcompile.ir.program import DECODE, PREFILL, VISION, Graph
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.ir.types import TYPE, parse_type
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.arguments import IGNORED, fitted, input_kinds, refuse_unknown, split_flags, without_unread
from qpcompile.runtime.machine import Machine


class Twice(torch.nn.Module):
    """A component of one input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.fixture(scope="module")
def graph() -> Graph:
    made = traced(Twice(), {"x": torch.ones(2, 3)}, owner="model.part")
    made.constants |= {"output_hidden_states": -2, "strategy": "default"}
    return made


def check(graph: Graph, **arguments: Any) -> None:
    flags, data = split_flags({"x": torch.ones(2, 3), **arguments})
    refuse_unknown(graph, flags, data)


def test_positions_of_text_alone_are_positions_on_every_axis() -> None:
    made = traced(Twice(), {"x": torch.ones(3, 2, 5, dtype=torch.long)})
    made.inputs = names(["position_ids"])
    node = next(node for node in made.nodes if node.op == "placeholder")
    node.meta = {TYPE: parse_type("i64[3, B, S0]")}
    plain = torch.arange(4).view(2, 2)
    found = fitted(made, input_kinds(made), {"position_ids": plain})["position_ids"]
    assert found.shape == (3, 2, 2) and torch.equal(found[2], plain)
    whole = torch.zeros(3, 2, 2, dtype=torch.long)
    assert fitted(made, input_kinds(made), {"position_ids": whole})["position_ids"] is whole
    node.meta = {TYPE: parse_type("i64[S1, B, S0]")}  # how many axes there are is not known
    with pytest.raises(InputError, match="2 axes"):
        fitted(made, input_kinds(made), {"position_ids": plain})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"anything": None},
        {"use_cache": True, "logits_to_keep": 1},
        {"output_hidden_states": -2, "strategy": "default"},
        {"return_dict": True, "output_attentions": False, "output_router_logits": None},
        {"features": [], "sizes": {}},
        {"masks": {"full_attention": None, "sliding_attention": None}, "parts": [None, []]},
    ],
)
def test_what_changes_nothing_is_let_through(graph: Graph, arguments: dict[str, Any]) -> None:
    check(graph, **arguments)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"y": torch.ones(1)}, "y, a tensor that its graph has no input for"),
        ({"x": {"full": torch.ones(1)}}, "x.full, a tensor"),
        ({"parts": [torch.ones(1)]}, "parts.0, a tensor"),
        ({"output_hidden_states": True}, "output_hidden_states=True, and its graph was traced with .*=-2"),
        ({"output_attentions": True}, "output_attentions=True, and its graph was traced with .*=False"),
        ({"return_dict": False}, "return_dict=False, and its graph was traced with return_dict=True"),
        ({"strategy": "full"}, "strategy='full', and its graph was traced with strategy='default'"),
        ({"scale": 0.5}, "scale=0.5, and its graph was traced without it"),
        ({"masks": {"full": None, "kind": 1}}, "masks={'full': None, 'kind': 1}, and its graph was traced without it"),
        ({"flag": False}, "flag=False, and its graph was traced without it"),
    ],
)
def test_what_the_graph_does_not_know_is_refused(graph: Graph, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(CaptureError, match=f"prefill was called with the argument {what}"):
        check(graph, **arguments)


def test_what_may_be_ignored_is_a_short_list_with_reasons() -> None:
    assert len(IGNORED) <= 3 and all(len(reason) > 20 for reason in IGNORED.values())


def called(name: str, **more: Any) -> None:
    """Call a component of the tiny LLaVA as transformers would, and with `more`."""
    machine = Machine(fresh(Recipe.load("none")))
    graph = machine.program.graphs[name]
    if name == VISION:
        given: dict[str, Any] = {"pixel_values": captured()[1]["one"]["pixel_values"], "output_hidden_states": -2}
    else:
        given = {"inputs_embeds": torch.ones(1, 5, 48), "position_ids": torch.arange(5)[None]}
    machine.host.get_submodule(graph.owner).forward(**given, **more)


@pytest.mark.parametrize("name", [VISION, PREFILL])
def test_components_refuse_by_name(name: str) -> None:
    called(name)
    with pytest.raises(CaptureError, match=f"{name} was called with the argument new_bias, a tensor") as caught:
        called(name, new_bias=torch.ones(1))
    assert "doctor" in str(caught.value.do) and caught.value.where


def test_a_cache_by_another_name_is_refused() -> None:
    for cache in (DynamicCache(), object()):
        with pytest.raises(CaptureError, match="prefill was called with the argument memory="):
            called(PREFILL, memory=cache)


def test_hidden_states_that_were_not_traced_are_refused() -> None:
    with pytest.raises(CaptureError, match="prefill was called with the argument output_hidden_states=True"):
        called(PREFILL, output_hidden_states=True)


def test_the_cache_has_the_name_that_transformers_gives_it() -> None:
    machine = Machine(fresh(Recipe.load("none")))
    answer = machine._language(inputs_embeds=torch.ones(1, 5, 48), position_ids=torch.arange(5)[None])
    assert answer[CACHE_ARGUMENT].seen == 5
    step = {"inputs_embeds": torch.ones(1, 1, 48), "position_ids": torch.tensor([[5]])}
    again = machine._language(**step, **{CACHE_ARGUMENT: answer[CACHE_ARGUMENT]}, use_cache=False)
    assert again[CACHE_ARGUMENT] is None and machine.last is not None and machine.last.seen == 6
    assert machine.program.graphs[DECODE].constants["use_cache"] is True


class Taking(torch.nn.Module):
    """A component that hands arguments on, and reads one of them."""

    def forward(self, x: torch.Tensor, strategy: str = "default", **kwargs: Any) -> torch.Tensor:
        return x * kwargs.get("factor", 1.0)


def test_settings_that_no_code_of_a_component_reads_are_left_out(graph: Graph) -> None:
    nowhere = "_".join(["aspect", "of", "nothing"])  # this file is read as well
    read = {"strategy": "full", "factor": 2.0, "is_causal": True, "use_cache": False, "features": [1]}
    given = {**read, nowhere: "anyres", f"{nowhere}s": torch.ones(1)}
    assert without_unread(Taking(), graph, given) == {key: value for key, value in given.items() if key != nowhere}


def test_code_that_cannot_be_read_may_read_anything(graph: Graph) -> None:
    hidden = type("Hidden", (Taking,), {"__module__": "no.such.module"})
    given = {"_".join(["aspect", "of", "nothing"]): "anyres"}
    assert without_unread(hidden(), graph, given) == given
