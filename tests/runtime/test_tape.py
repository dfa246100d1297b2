"""Replayed decode steps are bit-identical to steps node by node; a graph that cannot be replayed gives the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import Inputs, llava, qwen2_5_vl
from programs import program_of, traced
from torch import Tensor, nn

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.ir.program import DECODE, Graph
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.tape import Tape
from qpcompile.runtime import growing_cache as growing
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.cpu.tape import TapedDecode
from qpcompile.runtime.machine import Machine

compiled_c = pytest.mark.skipif(not native.available(), reason=native.library().problem)
FAST = ("quantize.weights.solver=rtn", "quantize.transform=hadamard", "tokens.candidate_layers=[0,1]")
SETTINGS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@functools.cache
def compiled(family: Callable[[], Any], dtype: torch.dtype, *cache: str) -> tuple[CompiledVLM, dict[str, Inputs]]:
    """A tiny model with token cuts and the given settings of its cache, and its prompts."""
    model, cases = family()
    cases = {name: {key: _cast(each, dtype) for key, each in case.items()} for name, case in cases.items()}
    recipe = qpcompile.Recipe.load("quota-30").with_overrides([*FAST, *(f"quantize.kv_cache.{each}" for each in cache)])
    return qpcompile.compile(model.to(dtype), recipe, calibration=[cases["one"]]), cases


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def taped(graphs: BoundGraphs) -> TapedDecode:
    found = graphs.modules[DECODE]
    assert isinstance(found, TapedDecode)
    return found


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every tape that was replayed, once per replay."""
    found: list[Tape] = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (found.append(tape), replay(tape))[1])
    return found


@compiled_c
@pytest.mark.parametrize(
    ("family", "dtype", "cache"),
    [
        (llava, torch.float32, ()),
        pytest.param(qwen2_5_vl, torch.bfloat16, (), marks=pytest.mark.slow),
        pytest.param(llava, torch.bfloat16, ("bits=8",), marks=pytest.mark.slow),
        pytest.param(qwen2_5_vl, torch.float32, ("key_bits=8",), marks=pytest.mark.slow),
    ],
)
def test_answers_have_the_same_bits(
    family: Any, dtype: torch.dtype, cache: tuple[str, ...], replays: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "ROOM", 7)
    model, cases = compiled(family, dtype, *cache)
    replays.clear()  # those of the compile's final check
    for case in (cases["one"], cases["padded"]):
        answers, caches = [], []
        for problem in ("left out by this test", ""):
            graphs = BoundGraphs(model.program)
            assert taped(graphs).problem == ""
            taped(graphs).problem = problem
            machine = Machine(model.program, graphs)
            answers.append(machine.generate(**case, **SETTINGS, max_new_tokens=18))
            caches.append(machine.last)
        assert taped(graphs).problem == ""
        assert torch.equal(answers[0].sequences, answers[1].sequences)
        assert all(map(torch.equal, answers[0].logits, answers[1].logits))
        assert all(torch.equal(caches[0].tensors[name], caches[1].tensors[name]) for name in caches[0].tensors)
        # After the first step there is room for seven more: the second step is recorded; then the caches are full.
        assert len(replays) >= 8 and len(set(replays)) >= 2
        replays.clear()


@compiled_c
def test_beams_are_run_node_by_node(replays: list[Tape]) -> None:
    model, cases = compiled(llava, torch.float32)
    model.machine.generate(**cases["padded"], **SETTINGS, max_new_tokens=6, num_beams=3)
    assert not replays


@compiled_c
def test_older_caches_and_results_stay(replays: list[Tape]) -> None:
    model, cases = compiled(llava, torch.float32)
    graphs = BoundGraphs(model.program)
    steps: list[tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]] = []

    def execute(graph: Graph, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        results = graphs(graph, feeds)
        if graph.name == DECODE:
            steps.append((feeds, dict(results), [each.clone() for each in results.values()]))
        return results

    Machine(model.program, execute).generate(**cases["one"], **SETTINGS, max_new_tokens=9)
    assert len(replays) == 6
    decode = model.program.graphs[DECODE]
    # From the middle of the answer it branches twice; then the answer continues where it ended.
    feeds, _, kept = steps[4]
    for _ in range(2):
        again = graphs(decode, {**feeds, "inputs_embeds": -feeds["inputs_embeds"]})
        assert not torch.equal(again["last_hidden_state"], kept[decode.outputs.index("last_hidden_state")])
    assert all(map(torch.equal, graphs(decode, feeds).values(), kept))
    for _, results, kept in steps:
        assert all(map(torch.equal, results.values(), kept))


@compiled_c
def test_other_caches_say_what_is_missing(replays: list[Tape]) -> None:
    model, cases = compiled(llava, torch.float32, "bits=16")
    graphs = BoundGraphs(model.program)
    assert "has no kernel in C for a decode step" in taped(graphs).problem
    assert model.decode_problem == graphs.decode_problem == taped(graphs).problem
    Machine(model.program, graphs).generate(**cases["one"], **SETTINGS, max_new_tokens=5)
    assert not replays


@compiled_c
@pytest.mark.slow
@pytest.mark.parametrize("key_bits", ["4", "8"])
def test_a_cache_of_8_bits_is_replayed(key_bits: str, replays: list[Tape]) -> None:
    model, cases = llava()
    recipe = qpcompile.Recipe.load("w8a8").with_overrides([*FAST[:2], f"quantize.kv_cache.key_bits={key_bits}"])
    made = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    assert made.decode_problem == ""
    replays.clear()  # those of the compile's final check
    made.machine.generate(**cases["one"], **SETTINGS, max_new_tokens=9)
    assert len(replays) == 6


def test_without_the_library_nothing_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = native.Library(None, "left out by this test", 0, False, False, {})
    monkeypatch.setattr(native, "library", lambda: nothing)
    model, _ = compiled(llava, torch.float32)
    assert taped(BoundGraphs(model.program)).problem == "left out by this test"


class Layer(nn.Module):
    """A quantizer and its linear without caches, followed by something else."""

    weight: Tensor
    scale: Tensor

    def __init__(self, extra: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.extra = extra
        self.register_buffer("weight", torch.randint(0, 255, (16, 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        ours = torch.ops.qpcompile
        return self.extra(
            x, ours.linear_int(*ours.quantize_dynamic(x, 0, 1.0, 4), self.weight, self.scale, None, x.dtype, 4)
        )


def negative(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def halved(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, alpha=0.5)


def one_row(x: Tensor, y: Tensor) -> Tensor:
    return x[:, :1] + y


def first_rows(x: Tensor, y: Tensor) -> Tensor:
    return y[:1]


def channels(x: Tensor, y: Tensor) -> Tensor:
    return y[..., :8]


@compiled_c
@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        *((torch.add, "no"), (negative, "aten::sub"), (halved, "aten::add"), (one_row, "aten::add")),
        *((channels, "no"), (first_rows, "aten::slice")),
    ],
)
def test_only_what_has_a_kernel(extra: Callable[[Tensor, Tensor], Tensor], problem: str) -> None:
    x = torch.randn(2, 3, 16)
    graph = traced(Layer(extra), {"x": x}, name=DECODE, axes={"x": [0]})
    bound = BoundGraphs(program_of(graph))
    assert taped(bound).problem.partition(".")[0].partition(" ")[0] == problem
    for _ in range(3):
        assert torch.equal(bound(graph, {"x": x})["y"], graph({"x": x})["y"])
