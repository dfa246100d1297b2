"""A machine binds a program to its host, and gives the host back."""

from __future__ import annotations

from typing import Any

import torch
from programs import captured, changed_recipe, fresh

from qpcompile.ir.program import Graph
from qpcompile.runtime.machine import Machine, execute_graph


def replaced(host: torch.nn.Module) -> list[str]:
    """Modules whose forward is not their class's."""
    return [name for name, module in host.named_modules() if "forward" in vars(module)]


def test_the_host_is_itself_again() -> None:
    program, ran = fresh(changed_recipe("none")), list[str]()

    def execute(graph: Graph, feeds: dict[str, Any]) -> dict[str, torch.Tensor]:
        ran.append(graph.name)
        return execute_graph(graph, feeds)

    with Machine(program, execute) as machine:
        assert replaced(program.host)
        machine.prefill(captured()[1]["one"])
    assert ran and not replaced(program.host)
    assert not any(isinstance(value, Machine) for module in program.host.modules() for value in vars(module).values())


def test_an_error_gives_the_host_back_too() -> None:
    program = fresh(changed_recipe("none"))
    try:
        with Machine(program):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not replaced(program.host)


def test_the_next_machine_starts_from_the_models_own_code() -> None:
    program, prompt = fresh(changed_recipe("none")), captured()[1]["one"]
    with Machine(program) as first:
        expected = first.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(Machine(program).generate(**prompt, max_new_tokens=3, do_sample=False), expected)
