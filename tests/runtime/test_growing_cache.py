"""A cache grows in place, with the same values as by `cat`, and never overwrites tokens that are still in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llava, qwen2_5_vl

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.ir.edit import clone
from qpcompile.ir.program import DECODE
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.cpu.tape import TapedDecode
from qpcompile.runtime.growing_cache import GrowingCaches, grow_in_place
from qpcompile.runtime.machine import Machine

FAST = ["quantize.weights.solver=rtn", "quantize.transform=hadamard", "tokens.candidate_layers=[0,1]"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def token(number: int) -> torch.Tensor:
    return torch.full((2, 3, 1, 4), float(number))


def test_appends_are_cats_and_the_memory_stays() -> None:
    caches, first = GrowingCaches(), torch.randn(2, 3, 5, 4)
    expected, grown, places = first, first, []
    for step in range(200):
        expected, grown = torch.cat([expected, token(step)], 2), caches.append(grown, token(step))
        assert torch.equal(grown, expected)
        places.append(grown.data_ptr())
    assert len(set(places)) == 4  # capacity for 70, 135 and 200 tokens, and then for 265
    assert len(first) == 2 and first.shape[2] == 5


def test_two_answers_from_one_cache_do_not_meet() -> None:
    caches = GrowingCaches()
    start = caches.append(torch.randn(2, 3, 5, 4), token(0))
    one, other = caches.append(start, token(1)), caches.append(start, token(2))
    assert torch.equal(one[:, :, -1:], token(1)) and torch.equal(other[:, :, -1:], token(2))
    assert torch.equal(one[:, :, :6], start) and torch.equal(other[:, :, :6], start)


def test_a_tensor_of_somebody_else_is_copied() -> None:
    caches, whole = GrowingCaches(), torch.zeros(2, 3, 9, 4)
    caches.append(whole[:, :, :5], token(1))
    assert not whole.any()


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        (llava, 16),
        *(pytest.param(llava, bits, marks=pytest.mark.slow) for bits in (8, 4)),
        *(pytest.param(qwen2_5_vl, bits, marks=pytest.mark.slow) for bits in (16, 8, 4)),
    ],
)
def test_answers_are_the_same(family: Any, bits: int) -> None:
    model, cases = family()
    # Torch's attention sums in another order where a cache has spare room: equal bits need wider sums.
    numerics = "numerics=exact" if bits == 16 else "numerics=fast"
    recipe = qpcompile.Recipe.load("quota-30").with_overrides([*FAST, f"quantize.kv_cache.bits={bits}", numerics])
    compiled = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    check(compiled, cases, 6 if bits == 16 else 12)


def check(compiled: CompiledVLM, cases: dict[str, Any], appended: int) -> None:
    """Logits of every prompt, alone, padded and with beams, equal those of graphs that copy; so do the caches."""
    graph = compiled.program.graphs[DECODE]
    bound = BoundGraphs(compiled.program)
    decode = bound.modules[DECODE]
    assert isinstance(decode, TapedDecode)
    grown = [node for node in decode.module.graph.nodes if getattr(node.target, "__name__", "") == "append"]
    assert len(grown) == appended
    plain = BoundGraphs(compiled.program)
    plain.modules[DECODE] = graph.module
    for case in cases.values():
        for beams in (1, 3):
            answers, caches = [], []
            for graphs in (plain, bound):
                machine = Machine(compiled.program, graphs)
                answers.append(machine.generate(**case, **SETTINGS, num_beams=beams))
                caches.append(machine.last)
            assert torch.equal(answers[0].sequences, answers[1].sequences)
            assert all(map(torch.equal, answers[0].logits, answers[1].logits))
            names = caches[0].tensors
            assert all(torch.equal(names[name], caches[1].tensors[name]) for name in names)
            assert caches[0].nbytes() == caches[1].nbytes()


def test_only_decode_grows_and_a_gpu_copies_packed_codes() -> None:
    model, cases = llava()
    recipe = qpcompile.Recipe.load("w4a4kv4").with_overrides(list(FAST))
    compiled = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    others = [graph for name, graph in compiled.program.graphs.items() if name != DECODE]
    assert len(others) == 4 and not any(grow_in_place(graph, GrowingCaches(), True) for graph in others)
    graph = clone(compiled.program.graphs[DECODE])
    assert grow_in_place(graph, GrowingCaches(), packed_codes=True) == 0
    assert grow_in_place(graph, GrowingCaches(), packed_codes=False) == 12
