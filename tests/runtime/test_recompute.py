"""The final check of a compile accepts a correct model and detects one whose decode is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from programs import captured, changed_recipe, fresh, traced
from torch import Tensor

import qpcompile
from qpcompile.errors import InvariantError, PlanError
from qpcompile.ir.names import CACHE
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.pass_list import passes
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime import recompute
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.machine import Machine, execute_graph
from qpcompile.runtime.recompute import EXACT, ROUNDED, STEPS, UNRELATED, check_answers, check_decode

Tensors = dict[str, Tensor]


@pytest.fixture
def machine() -> Machine:
    return Machine(fresh(Recipe.load("none")))


def check(machine: Machine, case: str = "one") -> None:
    check_decode(machine.program, machine, captured()[1][case])


def called(machine: Machine, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Call the decoder with changed arguments."""
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


def late(given: dict[str, Any]) -> dict[str, Any]:
    """Decode steps with positions off by one."""
    step = given["inputs_embeds"].shape[1] == 1
    return {**given, "position_ids": given["position_ids"] + 1} if step else given


def not_appended(graph: Graph, feeds: Tensors) -> Tensors:
    """A decode step that copies the previous slot into the new token's slot."""
    results = execute_graph(graph, feeds)
    for path, each in results.items():
        if graph.name == DECODE and path.startswith(CACHE):
            results[path] = torch.cat([each[:, :, :-1], each[:, :, -2:-1]], dim=2)
    return results


def test_a_wrong_position_is_found(machine: Machine) -> None:
    called(machine, late)
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine)


def test_of_several_rows_the_one_with_the_least_padding_is_compared(machine: Machine) -> None:
    def late_in(row: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def change(given: dict[str, Any]) -> dict[str, Any]:
            if given["inputs_embeds"].shape[1] > 1:
                return given
            later = given["position_ids"].expand(2, -1).clone()
            later[row] += 1
            return {**given, "position_ids": later}

        return change

    assert captured()[1]["padded"]["attention_mask"].sum(dim=1).argmax() == 1
    own = machine.host.get_submodule(machine.program.graphs[PREFILL].owner).forward
    called(machine, late_in(0))
    check(machine, "padded")
    machine.host.get_submodule(machine.program.graphs[PREFILL].owner).forward = own
    called(machine, late_in(1))
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine, "padded")


def test_a_token_that_is_not_appended_is_found(machine: Machine) -> None:
    machine.execute = not_appended
    with pytest.raises(InvariantError, match=r"logits are .* of their spread off"):
        check(machine)


# Where rounding hides small differences

RTN = (
    *("quantize.weights.solver=rtn", "quantize.smooth=null", "quantize.center=null"),
    "quantize.activations.clip_search=false",
)
Rounded = tuple[Machine, dict[str, Any]]


def half_precision(family: str, recipe: Recipe) -> Rounded:
    """A family's random model in bfloat16, compiled with the final check; and its first sample."""
    model, cases = FAMILIES[family]()
    samples = [
        {key: each.bfloat16() if each.is_floating_point() else each for key, each in cases[name].items()}
        for name in ("one", "longer")
    ]
    return qpcompile.compile(model.bfloat16(), recipe, calibration=samples).machine, samples[0]


@pytest.fixture(params=["half precision", "codes"])
def rounded(request: pytest.FixtureRequest) -> Rounded:
    if request.param == "half precision":
        return half_precision("llava", Recipe.load("none"))
    program, sample = fresh(changed_recipe("w4a4kv4", *RTN)), captured()[1]["one"]
    run_passes(program, passes((), 0))
    return Machine(program), sample


def test_defects_are_found_where_values_are_rounded(rounded: Rounded) -> None:
    machine, sample = rounded
    check_decode(machine.program, machine, sample)
    machine.execute, own = not_appended, machine.execute
    with pytest.raises(InvariantError, match=r"logits are .* off|stored of new tokens, .* off"):
        check_decode(machine.program, machine, sample)
    machine.execute = own
    called(machine, late)
    with pytest.raises(InvariantError, match=r"logits are .* off|stored of new tokens, .* off"):
        check_decode(machine.program, machine, sample)


@pytest.mark.parametrize(
    ("preset", "off", "passes_as"),
    [
        *(("w4a4kv4", off, True) for off in ((), ("one",), ("longer", "pictures"))),
        *(("w4a4kv4", off, False) for off in (("one", "longer"), ("one", "pictures"), ("one", "longer", "pictures"))),
        ("none", ("one",), False),
    ],
)
def test_with_codes_one_answer_may_be_off_by_chance(
    monkeypatch: pytest.MonkeyPatch, preset: str, off: tuple[str, ...], passes_as: bool
) -> None:
    machine = Machine(fresh(Recipe.load(preset)))

    def checked(program: Program, machine: Machine, sample: str) -> None:
        if sample in off:
            raise InvariantError(f"{sample} is off", where="here", do="nothing")

    monkeypatch.setattr(recompute, "check_decode", checked)
    samples: Any = ["one", "longer", "pictures", "never asked"]
    if passes_as:
        check_answers(machine.program, machine, samples)
        return
    with pytest.raises(InvariantError, match="one is off"):
        check_answers(machine.program, machine, samples)


@pytest.mark.parametrize("others", [0, 1])
def test_without_two_others_the_first_answer_counts(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    machine = Machine(fresh(Recipe.load("w4a4kv4")))
    results = iter([InvariantError("the first is off", where="here", do="nothing"), None])

    def checked(*given: Any) -> None:
        if (result := next(results)) is not None:
            raise result

    monkeypatch.setattr(recompute, "check_decode", checked)
    with pytest.raises(InvariantError, match="the first is off"):
        check_answers(machine.program, machine, [{}] * (1 + others))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["none", "w4a4kv4"])
@pytest.mark.parametrize("method", ["none", *PRUNERS])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_method_passes_in_bfloat16(family: str, method: str, preset: str) -> None:
    recipe = changed_recipe(preset, *(RTN if preset != "none" else ()))
    layers = [0] if method in ("fastv", "vtw", "dart") else [0, 1]
    if method != "none":
        cut = [f"tokens.method={method}", "tokens.keep=0.4", f"tokens.candidate_layers={layers}"]
        recipe = recipe.with_overrides(cut)
    try:
        half_precision(family, recipe)
    except PlanError as error:
        pytest.skip(f"{method} does not take this family: {error}")


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
    recompute._compare(program, found, expected, rounded, ROUNDED if rounded else EXACT)


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
    for found, other in ((torch.full_like(expected, torch.nan), expected), (expected, expected * torch.nan)):
        with pytest.raises(InvariantError):
            compare(found, other, rounded)


@pytest.mark.parametrize(("noise", "allowed"), [(0.01, ROUNDED), (0.1, 0.4), (0.5, UNRELATED)])
def test_a_model_that_last_bits_move_is_allowed_as_much(noise: float, allowed: float) -> None:
    """Codes of a deep decoder amplify last bits; logits that have nothing to do with each other are never allowed."""
    program = fresh(changed_recipe("w4a4kv4", *RTN))
    whole, other = torch.randn(2, STEPS, 50_000, generator=torch.Generator().manual_seed(1))
    moved = whole + noise * other
    assert recompute._allowed(program, whole, moved) == pytest.approx(allowed, rel=0.02)


class Ranking(torch.nn.Module):
    """A layer that ranks tokens by their scores, f[B, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([_Best()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class _Best(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.topk(x, 2, dim=-1).indices


def test_new_tokens_rank_what_a_scored_layer_holds() -> None:
    graph = traced(Ranking(), {"x": torch.ones(2, 6, 6)}, axes={"x": (0,)})
    whole = recompute._Whole(fresh(Recipe.load("none")), graph, CompiledCache(1), 2)
    scores = torch.arange(6.0).expand(1, 6, 6).contiguous()
    assert whole.run(scores)[0][0].tolist() == [[5, 4]] * 6
    whole.cache.alive[0], whole.compacted = torch.ones(1, 3, dtype=torch.bool), {0: torch.tensor([[0, 2, 4]])}
    assert whole.run(scores)[0][0].tolist() == [*[[5, 4]] * 4, *[[4, 2]] * 2]
