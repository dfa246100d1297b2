"""A moved program has every tensor on the new device once, and creates all other tensors there."""

from __future__ import annotations

import copy

import pytest
import torch
from families import llava, qwen2_5_vl
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.runtime.devices import move
from qpcompile.runtime.machine import Machine, execute_graph

META, GPU = torch.device("meta"), torch.device("cuda:0")
CHANGES = ["quantize.weights.solver=rtn", "quantize.transform=hadamard", "tokens.candidate_layers=[0,1]"]
Calls = list[tuple[Graph, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> tuple[CompiledVLM, Calls]:
    """A model with cuts and a 4-bit cache, and one call of each of its graphs."""
    model, cases = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}[request.param]()
    recipe = qpcompile.Recipe.load("quota-30").with_overrides(CHANGES)
    made = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    calls: dict[str, tuple[Graph, dict[str, torch.Tensor]]] = {}

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls[graph.name] = graph, feeds
        return execute_graph(graph, feeds)

    Machine(made.program, execute).generate(**cases["padded"], max_new_tokens=2, do_sample=False)
    return made, list(calls.values())


class OnDevice(fx.Interpreter):
    """Runs a graph and records the nodes whose tensors are on another device."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self.device, self.astray = device, list[str]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(each, torch.Tensor) and each.device != self.device for each in tensors):
            self.astray.append(n.format_node() or n.name)
        return value


def moved(program: Program, device: torch.device) -> Program:
    """A moved copy whose tensors have no data."""
    held = copy.deepcopy(program)
    move(held, META)
    if device != META:
        with FakeTensorMode():
            for module in (held.host, *(graph.module for graph in held.graphs.values())):
                for part in module.modules():
                    for group in (part._parameters, part._buffers):
                        for name, tensor in group.items():
                            if tensor is not None:
                                group[name] = torch.empty_strided(  # type: ignore[assignment]
                                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
                                )
            move(held, device)
    return held


def test_every_tensor_is_made_on_the_device(compiled: tuple[CompiledVLM, Calls]) -> None:
    program = moved(compiled[0].program, GPU)
    mode = next(iter(program.graphs[PREFILL].module.buffers())).fake_mode  # type: ignore[attr-defined]
    with mode:
        for graph, feeds in compiled[1]:
            there = [torch.empty(feeds[name].shape, dtype=feeds[name].dtype, device=GPU) for name in graph.inputs]
            runner = OnDevice(program.graphs[graph.name].module, GPU)
            runner.run(*there)
            assert not runner.astray, graph.name


def test_shared_weights_stay_shared(compiled: tuple[CompiledVLM, Calls]) -> None:
    program = moved(compiled[0].program, META)
    prefill, decode = (dict(program.graphs[name].module.named_buffers()) for name in (PREFILL, DECODE))
    packed = [name for name in prefill if name.endswith("_packed")]
    assert packed and all(prefill[name] is decode[name] for name in packed)
    tensors = [
        tensor
        for module in (program.host, *(graph.module for graph in program.graphs.values()))
        for tensor in (*module.parameters(), *module.buffers())
    ]
    assert all(tensor.device == META for tensor in tensors)


def test_moving_to_where_it_is_changes_nothing(compiled: tuple[CompiledVLM, Calls]) -> None:
    made, calls = compiled
    expected = [execute_graph(graph, feeds) for graph, feeds in calls]
    assert made.to("cpu") is made and made.device == torch.device("cpu")
    for (graph, feeds), results in zip(calls, expected, strict=True):
        found = execute_graph(made.program.graphs[graph.name], feeds)
        assert all(torch.equal(found[name], results[name]) for name in results)
