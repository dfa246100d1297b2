"""The check at the end of a compile lets a sound model pass and finds one whose decoding is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import captured, fresh
from torch import Tensor

from qpcompile.errors import InvariantError
from qpcompile.ir import recompute
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.recompute import EXACT, ROUNDED, STEPS, check_decode
from qpcompile.ir.run import Machine, execute_graph
from qpcompile.ir.structure import CACHE, CACHE_ARGUMENT
from qpcompile.recipe import Recipe

Tensors = dict[str, Tensor]


@pytest.fixture
def machine() -> Machine:
    return Machine(fresh(Recipe.load("none")))


def check(machine: Machine, case: str = "one") -> None:
    check_decode(machine.program, machine, captured()[1][case])


def called(machine: Machine, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have the decoder called with changed arguments."""
    decoder = machine.host.get_submodule(machine.program.graphs[PREFILL].owner)
    own = decoder.forward
    decoder.forward = lambda **arguments: own(**change(arguments))


@pytest.mark.parametrize("case", ["one", "pictures", "padded"])
def test_a_sound_model_passes_and_is_left_as_it_was(machine: Machine, case: str) -> None:
    execute = machine.execute
    check(machine, case)
    assert machine.execute is execute and machine.last is None


def test_an_ignored_cache_is_found(machine: Machine) -> None:
    called(machine, lambda given: {key: each for key, each in given.items() if key != CACHE_ARGUMENT})
    with pytest.raises(InvariantError, match="the cache holds 0 tokens") as caught:
        check(machine)
    assert "doctor" in str(caught.value.do)


def test_a_cache_that_nobody_reads_is_found(machine: Machine) -> None:
    def execute(graph: Graph, feeds: Tensors) -> Tensors:
        blind = {path: torch.zeros_like(each) if path.startswith(CACHE) else each for path, each in feeds.items()}
        return execute_graph(graph, blind if graph.name == DECODE else feeds)

    machine.execute = execute
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine)


def test_a_wrong_position_is_found(machine: Machine) -> None:
    def late(given: dict[str, Any]) -> dict[str, Any]:
        step = given["inputs_embeds"].shape[1] == 1
        return {**given, "position_ids": given["position_ids"] + 1} if step else given

    called(machine, late)
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine)


def test_a_token_that_is_not_appended_is_found(machine: Machine) -> None:
    def execute(graph: Graph, feeds: Tensors) -> Tensors:
        results = execute_graph(graph, feeds)
        for path, each in results.items():
            if graph.name == DECODE and path.startswith(CACHE):
                # The new token's slot holds what the slot before holds.
                results[path] = torch.cat([each[:, :, :-1], each[:, :, -2:-1]], dim=2)
        return results

    machine.execute = execute
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine)


def test_a_decode_that_fails_is_a_defect_too(machine: Machine) -> None:
    def execute(graph: Graph, feeds: Tensors) -> Tensors:
        if graph.name == DECODE:
            raise RuntimeError("sizes do not match\nmore")
        return execute_graph(graph, feeds)

    machine.execute = execute
    with pytest.raises(InvariantError, match=r"RuntimeError: sizes do not match\n"):
        check(machine)


def compare(found: Tensor, expected: Tensor, rounded: bool) -> None:
    program: Program = fresh(Recipe.load("none"))
    recompute._compare(program, found, expected, rounded)


def test_a_tie_is_no_defect_and_another_token_is() -> None:
    expected = torch.linspace(-1, 1, 100).repeat(STEPS, 1)
    tied = expected.clone()
    tied[1, 98] = tied[1, 99] + 1e-4
    compare(tied, expected, rounded=False)
    other = expected.clone()
    other[1, 50] = 1.5
    with pytest.raises(InvariantError, match="spread off"):
        compare(other, expected, rounded=False)
    with pytest.raises(InvariantError, match="the greedy token is 50, recomputed 99"):
        compare(other + 0.9 * (other == 1.5), expected, rounded=True)


@pytest.mark.parametrize(("rounded", "allowed"), [(False, EXACT), (True, ROUNDED)])
def test_distances_up_to_what_is_allowed_pass(rounded: bool, allowed: float) -> None:
    generator = torch.Generator().manual_seed(1)
    expected, noise = torch.randn(2, STEPS, 1000, generator=generator)
    compare(expected + 0.8 * allowed * noise, expected, rounded)
    with pytest.raises(InvariantError):
        compare(expected + 1.3 * allowed * noise, expected, rounded)
    with pytest.raises(InvariantError):
        compare(torch.full_like(expected, torch.nan), expected, rounded)
