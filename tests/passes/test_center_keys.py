"""Centred keys: the same attention, smaller rounding errors, an exact sink, and what decode caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import captured, changed_recipe, fresh, relative
from torch import fx

from qpcompile.errors import RecipeError
from qpcompile.ir.edit import aten, calls, is_call
from qpcompile.ir.node_facts import StubFact, stub_fact
from qpcompile.ir.operators import HADAMARD, QUANT_STUB
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.center_keys import CenterKeys, Keys, rows_of
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.pruning.table import check_method
from qpcompile.quantization.fake_quant import fake_quantize
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine, execute_graph

Apply = Callable[[Program, CenterKeys], bool]
CENTER = "quantize.kv_cache.center=true"
ROUGH = "quantize.weights.solver=rtn", "quantize.smooth=null", "quantize.center=null"


def recipe(*settings: str) -> Recipe:
    return changed_recipe(
        "w4a4kv4", "quantize.head_bits=16", *ROUGH, "quantize.activations.clip_search=false", *settings
    )


def ready(*settings: str) -> Program:
    """The captured LLaVA with stubs, and its keys rotated."""
    program = fresh(recipe(CENTER, *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([], 0), FoldTransforms()])
    return program


def test_each_key_is_less_by_one_vector_per_head(apply: Apply) -> None:
    """Between the rotation and the stub, in both graphs; the rest of the graph is what it was."""
    sample, program = captured()[1]["one"], ready()
    assert apply(program, CenterKeys([sample], 1))
    assert [entry.layer for entry in program.plan.key_centers] == [0, 1, 2]
    for name in (PREFILL, DECODE):
        graph = program.graphs[name]
        for stub in calls(graph, QUANT_STUB):
            fact = stub_fact(stub)
            assert fact is not None
            assert is_call(stub.args[0], aten.sub.Tensor) == (fact.role == "key")
            if fact.role == "key":
                inner, center = stub.args[0].args  # type: ignore[union-attr]
                assert isinstance(center, fx.Node) and is_call(inner, HADAMARD)
                assert str(center.target) == f"cache.{fact.layer}.center"


def test_attention_is_the_same() -> None:
    """Stubs round nothing: the first token's distribution has not changed."""
    sample, (with_center, without) = captured()[1]["one"], (ready(), ready())
    CenterKeys([sample], 1).run(with_center)
    found, expected = (_hidden(program, sample) for program in (with_center, without))
    assert relative(found, expected) < 1e-5


def _hidden(program: Program, sample: dict[str, Any]) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            seen.append(next(iter(results.values())))
        return results

    with Machine(program, execute) as machine:
        machine.prefill(sample)
    return seen[0]


def drawn(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [1, 2, S, 16] with large channel means, and residuals of which the third token's is massive."""
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, tokens, 16, generator=made) + 5 * torch.randn(1, 2, 1, 16, generator=made)
    residual = torch.randn(1, tokens, 8, generator=made)
    residual[:, 2] *= 1000
    keys[:, :, 2] = 9 * torch.randn(2, 16, generator=made)
    return keys, residual


@pytest.mark.parametrize("bits", [4, 8])
def test_the_sink_is_exact_and_the_others_are_closer(bits: int) -> None:
    keys, residual = drawn()
    scheme, fact = recipe(f"quantize.kv_cache.bits={bits}").quantize, StubFact("", "key", 0)
    assert scheme is not None
    found = Keys()
    (row,) = rows_of(keys, residual, torch.ones(1, 40, dtype=torch.bool))
    found.add(row)
    center = found.center(scheme).float()
    rounded = fake_quantize(keys - center, fact, scheme) + center
    assert relative(rounded[:, :, 2], keys[:, :, 2]) < 1e-5
    others = [place for place in range(40) if place != 2]
    plain = fake_quantize(keys, fact, scheme)
    assert relative(rounded[:, :, others], keys[:, :, others]) < 0.7 * relative(plain[:, :, others], keys[:, :, others])
    told = found.told(3)
    assert told.layer == 3 and told.share > 0.9 and told.sink is not None and told.sink > 100


def test_without_a_massive_token_it_is_the_mean() -> None:
    """Padding and massive tokens do not count."""
    keys, residual = drawn()
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[:, :5] = False
    scheme, found = recipe().quantize, Keys()
    assert scheme is not None
    (row,) = rows_of(keys, residual, valid)
    found.add(row)
    assert found.sink is None and found.tokens == 35
    torch.testing.assert_close(found.center(scheme)[0, :, 0], keys[0, :, 5:].double().mean(dim=1))


def test_nothing_to_do(apply: Apply) -> None:
    sample = captured()[1]["one"]
    assert not apply(ready("quantize.kv_cache.center=false"), CenterKeys([sample], 1))


def test_a_method_that_reads_norms_of_keys_is_refused() -> None:
    pruned = recipe(CENTER, "tokens.method=dart", "tokens.keep=0.5", "tokens.candidate_layers=[0]")
    with pytest.raises(RecipeError, match="norms of their keys"):
        check_method(pruned)
    check_method(pruned.with_overrides(["tokens.method=fastv"]))


@pytest.mark.parametrize("setting", ["quantize.kv_cache.bits=16", "quantize.kv_cache.granularity=kivi"])
def test_refused_recipes(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"kv_cache\.center"):
        recipe(CENTER, setting)
