"""A compile computes where it is asked to: on fake CUDA tensors, and on a second device that computes on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import captured, changed_recipe, fresh
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import qpcompile
from qpcompile.calibration.blocks import split_blocks
from qpcompile.calibration.statistics import InputStatistics
from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.samples import Samples
from qpcompile.errors import KernelError
from qpcompile.ir.edit import get_tensor, set_tensor
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Graph, Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.quantization.fake_quant import fake_quantize
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import Machine, execute_graph
from qpcompile.runtime.placement import Placement, compute_device

TESTS = Path(__file__).resolve().parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RECIPES = ("quota-30", "w4a4kv4")


def compared(*words: str) -> dict[str, Any]:
    """What tests/second_device.py finds, in a process of its own."""
    paths = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, str(TESTS / "second_device.py"), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=paths)
    return json.loads(done.stdout.splitlines()[-1])


def assert_agrees(found: dict[str, Any]) -> None:
    """All work was done on the second device; both compiles decided the same, up to sums in another order."""
    assert set(found["work"]) == {"second"}
    assert found["same_plan"]
    assert found["codes"] < 0.02 and found["numbers"] < 1e-3 and found["ratios"] < 1e-3
    assert found["site_errors"] < 0.02 and found["training"] < 1e-3 and found["sensitivity"] < 1e-3


def assert_agrees_after_training(found: dict[str, Any]) -> None:
    """The same with learned transforms: Adam's first step is the gradient's sign, which sums near zero flip."""
    assert set(found["work"]) == {"second"}
    assert found["same_plan"]
    assert found["ratios"] < 0.05 and found["training"] < 0.05 and found["sensitivity"] < 0.05
    assert found["site_errors"] < 0.15


def test_a_second_device_gives_the_same_compile() -> None:
    found = compared("tiny", "w4a4kv4", "quantize.training.epochs=1", "quantize.training.samples=1")
    assert_agrees(found)
    # Calibration, training, clips and solving, and the check that what is counted is counted.
    assert {"aten.round.default", "qpcompile.kronecker.default", "aten.linalg_solve_triangular.default"} <= set(
        found["work"]["second"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("quota-30", "quantize.training.epochs=1"),
        ("joint-30", "quantize.transform=hadamard", "calibration.after_cuts=true"),
        ("w4a4kv4", "quantize.transform=rotation", "quantize.scaling=mbq", "quantize.smooth=null"),
        ("w4a4kv4", "quantize.transform=hadamard", "quantize.activations.granularity=modality"),
        ("w4a4kv4", "quantize.transform=none", "quantize.simulation=qvlm", "quantize.kv_cache.bits=16"),
    ],
    ids=lambda words: words[0] + words[-1],
)
def test_every_measurement_runs_on_a_second_device(words: tuple[str, ...]) -> None:
    assert_agrees(compared("tiny", *words))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_testbeds_compile_on_a_second_device(bed: str, recipe: str) -> None:
    settings = ("quantize.training.epochs=1", "quantize.training.samples=2", "calibration.samples=2")
    assert_agrees_after_training(compared(str(TESTS / "testbed" / bed), recipe, *settings))


def faked(mode: FakeTensorMode, program: Program) -> None:
    """Replace the tensors of all graphs by fake ones on the CPU."""
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = get_tensor(graph.module, str(node.target))
                if not isinstance(tensor, FakeTensor):
                    set_tensor(graph.module, str(node.target), mode.from_tensor(tensor.detach(), static_shapes=True))


def recorded(program: Program, sample: dict[str, Any]) -> list[tuple[Graph, dict[str, torch.Tensor]]]:
    """Every graph that a prompt runs, with its inputs."""
    calls: list[tuple[Graph, dict[str, torch.Tensor]]] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append((graph, feeds))
        return execute_graph(graph, feeds)

    with Machine(program, execute) as machine:
        machine.prefill(sample)
    return calls


def on_cuda(node: fx.Node, _: Any, value: Any) -> Any:
    """Every operator's result is on the accelerator."""
    for tensor in tree_leaves(value):
        assert not isinstance(tensor, torch.Tensor) or tensor.device == CUDA, node
    return value


def check_on_fake_cuda(program: Program, sample: dict[str, Any]) -> None:
    """Whole graphs and their blocks, and what calibration does at stubs, on fake CUDA tensors.

    A torch without CUDA refuses to index fake CUDA tensors in Python, and to differentiate: solving, packing and
    training are tested on the second device.
    """
    run_passes(program, [Canonicalize(), InsertQuantStubs()])
    calls = recorded(program, sample)
    scheme = program.recipe.quantize
    assert scheme is not None

    def look(node: fx.Node, value: Any) -> Any:
        on_cuda(node, (), value)
        fact = stub_fact(node)
        if fact is not None and fact.role == "activation":
            found = InputStatistics.empty(value.shape[-1], True, value.device)
            found.add(value)
            assert {tensor.device for tensor in found.to(CPU).tensors().values()} == {CPU}
            return fake_quantize(value, fact, scheme)
        return value

    mode, on = FakeTensorMode(), Placement(CPU, CUDA)
    faked(mode, program)
    for graph, real in calls:
        feeds: dict[str, torch.Tensor] = {
            name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in real.items()
        }
        with mode, torch.no_grad():
            results = run_watched(graph, feeds, on_cuda, on)
            assert {tensor.device for tensor in results.values()} == {CPU}
            entry, blocks = split_blocks(graph)
            values = on.back(entry.run(feeds, on, look, plain=False))
            for block in blocks:
                with on.holding():
                    values = on.back(block.run(values, on, look, plain=False))


def test_a_tiny_model_on_fake_cuda() -> None:
    _, cases, _ = captured()
    check_on_fake_cuda(fresh(changed_recipe("quota-30")), cases["one"])


@pytest.mark.slow
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_testbed_on_fake_cuda(bed: str, recipe: str) -> None:
    model, processor = load_model(TESTS / "testbed" / bed)
    sample = Samples(TESTS / "testbed" / "calibration" / bed, processor, 1, 0).example()
    check_on_fake_cuda(capture(model, sample, Recipe.load(recipe)), sample)


def test_fake_cuda_finds_a_tensor_that_stayed() -> None:
    """The check of the check: a graph whose weight is not copied is refused."""
    program = fresh(changed_recipe("none"))
    graph, mode = program.graphs["projector"], FakeTensorMode()
    faked(mode, program)
    with mode:
        feeds: dict[str, torch.Tensor] = {name: torch.empty(1, 4, 32, device=CUDA) for name in graph.inputs}
        with pytest.raises(RuntimeError, match="device"):
            execute_graph(graph, feeds)


@pytest.mark.parametrize("device", ["cuda", "meta", "vulkan:3", "nonsense"])
def test_a_device_that_is_not_there_is_refused_at_once(device: str) -> None:
    with pytest.raises(KernelError, match=re.escape(f"cannot compute on {device}")) as caught:
        qpcompile.compile("a model that is not looked for", "none", device=device)
    assert "sees cpu" in str(caught.value)


def test_a_device_has_its_number() -> None:
    assert compute_device("cpu") == CPU
    with pytest.raises(KernelError):
        compute_device(7)


def test_nothing_is_copied_where_both_devices_are_one() -> None:
    on, tensor = Placement(CPU, CPU), torch.ones(3)
    assert on.there(tensor) is tensor and on.back({"a": tensor})["a"] is tensor
    module = torch.nn.Linear(2, 2)
    assert on.weight(module, "weight") is module.weight


def test_a_weight_is_copied_once_in_a_turn_and_again_when_it_was_replaced() -> None:
    on = Placement(CPU, CUDA)
    with FakeTensorMode():
        module = torch.nn.Linear(2, 2).requires_grad_(False)
        with on.holding():
            first = on.weight(module, "weight")
            assert first.device == CUDA and on.weight(module, "weight") is first
            module.weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
            assert on.weight(module, "weight") is not first
        assert on.weight(module, "weight") is not on.weight(module, "weight")
