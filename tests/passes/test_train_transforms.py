"""Learned changes of basis: exact before rounding, better after it, and deterministic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from programs import captured, changed_recipe, fresh, relative

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import KRONECKER, LINEAR_INT, QUANT_STUB
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, VISION, Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.passes.train_transforms import TrainTransforms
from qpcompile.runtime.machine import Machine

Apply = Callable[[Program, TrainTransforms], bool]
KEYS = ("quantize.training.samples=2", "quantize.training.epochs=6", "quantize.training.batch=1")


def folded(transform: str, *settings: str) -> Program:
    _, cases, _ = captured()
    samples = [cases["one"], cases["longer"]]
    recipe = changed_recipe("w4a4kv4", f"quantize.transform={transform}", *KEYS, *settings)
    program = fresh(recipe)
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate(samples, 2), FoldTransforms()])
    return program


@functools.cache
def training() -> TrainTransforms:
    _, cases, _ = captured()
    return TrainTransforms([cases["one"], cases["longer"]], 2)


def hidden(program: Program) -> torch.Tensor:
    """The outputs of the prefill graph for one sample."""
    _, cases, _ = captured()
    seen = {}

    def execute(graph, feeds):  # noqa: ANN001, ANN202
        with torch.no_grad():
            result = graph(feeds)
        if graph.name == PREFILL:
            seen["hidden"] = next(iter(result.values()))
        return result

    Machine(program, execute).prefill(cases["one"])
    return seen["hidden"]


@pytest.mark.parametrize("transform", ["rotation", "flatquant"])
def test_trains_and_stays_exact(apply: Apply, transform: str) -> None:
    program = folded(transform, "quantize.center=0")
    before, weights = hidden(program), get_tensor(program.graphs[PREFILL].module, "layers.0.mlp.down_proj.weight")
    assert apply(program, training())
    assert relative(hidden(program), before) < 1e-3, "no rounding yet: the function is the same"
    after = get_tensor(program.graphs[PREFILL].module, "layers.0.mlp.down_proj.weight")
    assert not torch.allclose(after, weights)
    trained = program.plan.trained
    assert {block.name for block in trained} >= {f"prefill layer {layer}" for layer in range(3)} | {"vision layer 0"}
    assert all(block.after <= block.before for block in trained)
    assert sum(block.after for block in trained) < 0.97 * sum(block.before for block in trained)


def test_rotations_stay_rotations() -> None:
    program = folded("rotation")
    training().run(program)
    for node in calls(program.graphs[PREFILL], KRONECKER):
        left, right = (get_tensor(program.graphs[PREFILL].module, str(node.args[side].target)) for side in (2, 3))  # type: ignore[union-attr]
        product = torch.kron(left, right).double()
        eye = torch.eye(len(product), dtype=torch.float64)
        assert torch.allclose(product @ product.T, eye, atol=1e-4)


def test_decode_gets_what_prefill_gets() -> None:
    program = folded("flatquant")
    training().run(program)
    prefill, decode = program.graphs[PREFILL].module, program.graphs[DECODE].module
    names = {str(node.target) for node in program.graphs[DECODE].nodes if node.op == "get_attr"}
    shared = [name for name in names if "proj" in name or name.startswith("transforms.")]
    assert len(shared) > 20
    assert all(torch.equal(get_tensor(prefill, name), get_tensor(decode, name)) for name in shared)


def test_statistics_move_with_the_basis() -> None:
    program = folded("flatquant", "quantize.center=0")
    training().run(program)
    found = program.measured[CALIBRATION].inputs
    again = fresh(program.recipe)
    again.graphs = program.graphs
    _, cases, _ = captured()
    Calibrate([cases["one"], cases["longer"]], 2).run(again)
    for site, statistics in again.measured[CALIBRATION].inputs.items():
        moved, expected = found[site].moments, statistics.moments
        assert moved is not None and expected is not None
        assert relative(moved.dense(), expected.dense()) < 1e-2, site


def test_twice_gives_the_same_bytes() -> None:
    first, second = folded("flatquant"), folded("flatquant")
    for program in (first, second):
        training().run(program)
    assert first.plan == second.plan
    for name in (PREFILL, VISION):
        modules = [program.graphs[name].module for program in (first, second)]
        for node in first.graphs[name].nodes:
            if node.op == "get_attr":
                assert torch.equal(*(get_tensor(module, str(node.target)) for module in modules))


def test_learned_clips_reach_the_operator() -> None:
    program = folded("rotation")
    training().run(program)
    facts = [stub_fact(stub) for stub in calls(program.graphs[PREFILL], QUANT_STUB)]
    clips = {fact.clip for fact in facts if fact is not None and fact.role == "activation"}
    assert len(clips) > 5 and all(clip is not None and 0 < clip < 1 for clip in clips)
    program.stage = "cut"
    QuantizeWeights().run(program)
    assert list(calls(program.graphs[PREFILL], LINEAR_INT))


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_nothing_to_do(apply: Apply, transform: str) -> None:
    program = folded(transform)
    assert not apply(program, training())
    assert program.plan.trained == ()
