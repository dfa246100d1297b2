"""Programs for the tests of passes: a captured tiny model, cloned per test, and graphs traced from a few lines."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from families import Cases, llava
from torch import fx
from torch.export import Dim
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qpcompile.calibration.statistics import CALIBRATION, Calibration, InputStatistics
from qpcompile.capture.capture import capture
from qpcompile.ir.edit import calls, clone, get_tensor
from qpcompile.ir.names import names
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import DECODE, PREFILL, VISION, Graph, Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.recipe.plan import Layer, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

HERE = Placement(torch.device("cpu"), torch.device("cpu"))


@functools.cache
def captured() -> tuple[PreTrainedModel, Cases, Program]:
    """A random LLaVA of three layers, its prompts, and the program traced from it; change none of them."""
    model, cases = llava()
    return model, cases, capture(model, cases["one"], Recipe.load("none"))


def fresh(recipe: Recipe) -> Program:
    """A copy of the captured LLaVA with another recipe, which may be changed."""
    _, _, program = captured()
    graphs = {name: clone(graph) for name, graph in program.graphs.items()}
    layers = program.layers
    return Program(graphs, copy.deepcopy(program.host), program.layers, recipe, Plan(recipe=recipe, layers=layers))


def traced(
    module: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: Sequence[str] = ("y",),
    name: str = PREFILL,
    axes: Mapping[str, Sequence[int]] | None = None,
    owner: str = "model",
) -> Graph:
    """A graph of `module(**inputs)`, whose axes 0 and 1 are symbolic, or, for an input in `axes`, those given there.

    Dots in the names of inputs become underscores in the arguments of `module.forward`.
    """
    arguments = {path.replace(".", "_"): tensor for path, tensor in inputs.items()}
    shapes = {
        path.replace(".", "_"): dict.fromkeys((axes or {}).get(path, range(min(tensor.ndim, 2))), Dim.AUTO)
        for path, tensor in inputs.items()
    }
    exported = torch.export.export(module.eval(), (), arguments, dynamic_shapes=shapes)
    made = exported.module(check_guards=False)
    made.graph.set_codegen(CodeGen())
    output = next(node for node in made.graph.nodes if node.op == "output")
    values = tree_leaves(output.args[0])
    output.args = (tuple(values),)
    for node in made.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = get_tensor(made, str(node.target))
    plain = fx.GraphModule(made, made.graph)
    plain.graph.eliminate_dead_code()
    plain.recompile()
    return Graph(name, plain, names(inputs), names(outputs), owner)


class Nothing(torch.nn.Module):
    """The placeholder for a component that a test does not use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@functools.cache
def _nothing(name: str) -> Graph:
    return traced(Nothing(), {"x": torch.ones(2, 3)}, name=name, owner=f"model.{name}")


def program_of(*graphs: Graph, recipe: Recipe | str = "none", stage: Stage = "captured", layers: int = 1) -> Program:
    """A program of these graphs; required components that are missing are filled in."""
    held = {graph.name: graph for graph in graphs}
    for name in (VISION, PREFILL, DECODE):
        if name not in held:
            held[name] = clone(_nothing(name))
    recipe = Recipe.load(recipe)
    entries = tuple(Layer(index=index, name=f"model.layers.{index}") for index in range(layers))
    return Program(held, torch.nn.Module(), entries, recipe, Plan(recipe=recipe, layers=entries), stage)


def run(graph: Graph, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a graph without gradients; `feeds` are named by input path, with underscores for dots."""
    with torch.no_grad():
        return graph({path: feeds[path.replace(".", "_")] for path in graph.inputs})


def changed_recipe(name: str, *settings: str) -> Recipe:
    """A preset with overrides as on the command line, `tokens.keep=0.5`.

    Its change of basis is a fixed rotation, which needs no training, unless a setting says otherwise.
    """
    recipe = Recipe.load(name)
    fixed = [] if recipe.quantize is None else ["quantize.transform=hadamard"]
    return recipe.with_overrides([*fixed, *settings])


def stubbed(*graphs: Graph, recipe: Recipe, layers: int = 1) -> Program:
    """A program with quant stubs and synthetic statistics for them, ready for a change of basis."""
    program = program_of(*graphs, recipe=recipe, layers=layers)
    for item in (Canonicalize(), InsertQuantStubs()):
        item.run(program)
    made, found = torch.Generator().manual_seed(5), Calibration(samples=1)
    for graph in program.graphs.values():
        for stub in calls(graph, QUANT_STUB):
            fact = stub_fact(stub)
            if fact is not None and fact.role == "activation" and fact.site not in found.inputs:
                rows = torch.randn(64, int(stub.meta["val"].shape[-1]), generator=made)
                found.inputs[fact.site] = InputStatistics.empty(rows.shape[1], moments=True)
                found.inputs[fact.site].add(rows * torch.linspace(0.2, 3, rows.shape[1]))
    program.measured[CALIBRATION] = found
    program.stage = "calibrated"
    return program


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
