"""Methods that select before the decoder, and DART after its second layer: what they keep on a tiny LLaVA.

The selection is recomputed in numpy from the embeddings that the graph reads, one prompt at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from families import IMAGE, Inputs
from programs import captured, changed_recipe, fresh, program_of
from toy_decoder import decode_graph, prefill_graph

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import PlanError, RecipeError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL
from qpcompile.ir.text import graph_text
from qpcompile.pass_list import passes
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.pruning.pruner import INPUT, RiskFuser
from qpcompile.pruning.table import PRUNERS, check_method
from qpcompile.recipe.plan import Cut

Array = np.ndarray[Any, Any]
KEEP = 0.4
METHODS = ("cdpruner", "qapruner", "divprune", "trim", "dart")
IN_DECODER = ("fastv", "pyramiddrop", "quota", "sparsevlm")


@functools.cache
def compiled(method: str, *settings: str) -> CompiledVLM:
    """The tiny LLaVA, not quantized, pruned by one method."""
    recipe = changed_recipe("none", f"tokens.method={method}", f"tokens.keep={KEEP}", *settings)
    program = fresh(recipe)
    run_passes(program, passes((), 0))
    return CompiledVLM(program)


def kept(method: str, inputs: Inputs, *settings: str) -> list[list[int]]:
    """Kept positions of the prompt, by row."""
    (found,) = compiled(method, *settings).kept_tokens(**inputs).values()
    return [[position for position in row if position >= 0] for row in found.tolist()]


def embeddings(inputs: Inputs) -> torch.Tensor:
    """The inputs of the decoder, f32[B, S, C]."""
    model, _, _ = captured()
    seen: list[torch.Tensor] = []
    language: Any = model.get_submodule("model.language_model")
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def relevance(visual: Array, text: Array, sign: int) -> Array:
    mean = sign * (unit(visual) @ unit(text).T).mean(axis=1)
    return (mean - mean.min() + 1e-6) / (mean.max() - mean.min() + 1e-6)


def risk(visual: Array) -> Array:
    """Half the error, half the range; the tiny model is narrower than a group."""
    scale = np.abs(visual).max(axis=1, keepdims=True) / 7
    error = np.linalg.norm(visual - np.round(visual / (scale + 1e-8)) * scale, axis=1)
    spread = visual.max(axis=1) - visual.min(axis=1)
    parts = [(each - each.min() + 1e-8) / (each.max() - each.min() + 1e-8) for each in (error, spread)]
    return (parts[0] + parts[1]) / 2


def by_determinants(visual: Array, weight: Array, count: int) -> set[int]:
    kernel = weight[:, None] * (unit(visual) @ unit(visual).T) * weight
    chosen: list[int] = []
    for _ in range(count):
        free = [i for i in range(len(visual)) if i not in chosen]
        chosen.append(max(free, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    return set(chosen)


def by_distances(visual: Array, count: int) -> set[int]:
    distance = 1 - unit(visual) @ unit(visual).T
    np.fill_diagonal(distance, np.inf)
    chosen = [int(distance.min(axis=1).argmax())]
    while len(chosen) < count:
        free = [i for i in range(len(visual)) if i not in chosen]
        chosen.append(max(free, key=lambda i: distance[i, chosen].min()))
    return set(chosen)


def expected(method: str, inputs: Inputs, sign: int = 1) -> list[list[int]]:
    """The kept tokens of each row: its text, and the visual tokens selected by the method's formulas."""
    rows = []
    for values, ids, mask in zip(
        embeddings(inputs).double().numpy(), inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        own = (ids == IMAGE).nonzero().flatten().numpy()
        text = ((ids != IMAGE) & mask.bool()).nonzero().flatten().numpy()
        visual, count = values[own], -(-len(own) * 4 // 10)
        like = relevance(visual, values[text[text > own[0]]], sign)
        if method == "qapruner":
            found = risk(visual)
            share = 0.55 - 0.1 * np.clip(found.std(ddof=1) / (found.mean() + 1e-8) - 0.2, 0, 1)
            like = share * like + (1 - share) * found
        if method == "trim":
            chosen = set(np.argsort(-like, kind="stable")[:count].tolist())
        elif method == "divprune":
            chosen = by_distances(visual, count)
        else:
            chosen = by_determinants(visual, like, count)
        rows.append(sorted([*text.tolist(), *[int(own[i]) for i in chosen]]))
    return rows


@pytest.mark.parametrize("case", ["one", "padded", "pictures"])
@pytest.mark.parametrize("method", ["cdpruner", "qapruner", "divprune", "trim"])
def test_keeps_what_the_formulas_choose(method: str, case: str) -> None:
    _, cases, _ = captured()
    assert kept(method, cases[case]) == expected(method, cases[case])


@pytest.mark.parametrize("method", ["cdpruner", "trim"])
def test_minus_turns_relevance_round(method: str) -> None:
    _, cases, _ = captured()
    minus = kept(method, cases["longer"], "tokens.relevance_sign=minus")
    assert minus == expected(method, cases["longer"], sign=-1) != kept(method, cases["longer"])


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_keeps_the_same_tokens_alone_and_in_a_batch(method: str) -> None:
    _, cases, _ = captured()
    batch = cases["padded"]
    together = kept(method, batch)
    for row in range(len(together)):
        real = batch["attention_mask"][row].bool()
        alone = {key: batch[key][row : row + 1, real] for key in ("input_ids", "attention_mask")}
        alone["pixel_values"] = batch["pixel_values"][row : row + 1]
        assert kept(method, alone)[0] == [position - int((~real).sum()) for position in together[row]]


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_nothing(method: str) -> None:
    model, cases, _ = captured()
    recipe = changed_recipe("none", f"tokens.method={method}", "tokens.keep=1.0")
    program = fresh(recipe)
    run_passes(program, passes((), 0))
    assert not program.plan.cuts
    options = {"max_new_tokens": 4, "do_sample": False}
    generate: Any = model.generate
    assert torch.equal(CompiledVLM(program).generate(**cases["one"], **options), generate(**cases["one"], **options))


def test_alpha_one_is_cdpruner_and_alpha_zero_the_risk_alone() -> None:
    _, cases, _ = captured()
    inputs = cases["longer"]
    fixed = "tokens.risk.dynamic_alpha=false"
    assert kept("qapruner", inputs, "tokens.risk.alpha=1.0", fixed) == kept("cdpruner", inputs)
    values = embeddings(inputs)[0].double().numpy()
    own = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().numpy()
    chosen = by_determinants(values[own], risk(values[own]), -(-len(own) * 4 // 10))
    of_risk = kept("qapruner", inputs, "tokens.risk.alpha=0.0", fixed)[0]
    assert {position for position in of_risk if position in own} == {int(own[i]) for i in chosen}


@pytest.mark.slow
def test_the_risk_changes_what_methods_keep() -> None:
    _, cases, _ = captured()
    fusers = [name for name, method in PRUNERS.items() if isinstance(method, RiskFuser)]
    assert len(fusers) == 7
    for method in fusers:
        # Without a share, three quarters of prumerge_plus' tokens are spaced evenly, whatever the scores.
        more = ("tokens.candidate_layers=[0]",) if method in IN_DECODER else ("tokens.spread_share=0.0",)
        risk = (*more, "tokens.risk.fuse=true", "tokens.risk.dynamic_alpha=false")
        plain = kept(method, cases["longer"], *more)
        none, fused = (kept(method, cases["longer"], *risk, f"tokens.risk.alpha={alpha}") for alpha in (1.0, 0.0))
        assert plain == none != fused, method


def test_dart_cuts_behind_the_second_layer_once() -> None:
    assert [cut.layer for cut in compiled("dart").plan.cuts] == [1]
    assert [cut.layer for cut in compiled("dart", "tokens.candidate_layers=[0]").plan.cuts] == [0]
    with pytest.raises(PlanError, match="dart cuts once, 2 layers are named"):
        compiled("dart", "tokens.candidate_layers=[0, 1]")


def test_risk_of_a_method_that_has_none_is_refused() -> None:
    recipe = changed_recipe("none", "tokens.method=divprune", "tokens.keep=0.5", "tokens.risk.fuse=true")
    with pytest.raises(RecipeError, match="divprune cannot fuse the risk") as caught:
        check_method(recipe)
    able = "fastv, prumerge_plus, pyramiddrop, quota, sparsevlm, trim, visionzip"
    assert caught.value.do == f"write false, or choose one of {able}"


def test_golden_scores() -> None:
    recipe = changed_recipe("none", "tokens.method=qapruner", "tokens.keep=0.5")
    program = program_of(prefill_graph(masked=True), decode_graph(), recipe=recipe, layers=2)
    Canonicalize().run(program)
    program.stage = "planned"
    program.plan = program.plan.changed(cuts=(Cut(layer=INPUT, ratio=0.5, numerator=1, denominator=2),))
    InsertTokenCuts().run(program)
    lines = graph_text(program.graphs[PREFILL]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "text_relevance" in line)
    end = next(number for number, line in enumerate(lines) if "sym_size" in line and number > start)
    expecttest.assert_expected_inline(
        "".join(lines[start:end]),
        """\
%16 = qpcompile::text_relevance(%0, %2, %3, 1) : f32[B, S0]
%17 = aten::bitwise_and.Tensor(%2, %3) : bool[B, S0]
%18 = aten::bitwise_and.Tensor(%2, %3) : bool[B, S0]
%19 = qpcompile::quantization_risk(%0, %18, 'complex', 128) : f32[B, S0]
%20 = qpcompile::fuse_risk(%16, %19, %17, 0.55, True, False) : f32[B, S0]
%21 = aten::sum.dim_IntList(%2, [1]) : i64[B]
%22 = aten::mul.Tensor(%21, 1) : i64[B]
%23 = aten::add.Tensor(%22, 1) : i64[B]
%24 = aten::div.Tensor_mode(%23, 2, rounding_mode='floor') : i64[B]
%25 = aten::bitwise_and.Tensor(%2, %3) : bool[B, S0]
%26 = qpcompile::dpp_select(%0, %20, %25, %24) : f32[B, S0]
%27 = aten::where.ScalarOther(%2, %26, inf) : f32[B, S0]
%28 = aten::where.ScalarOther(%3, %27, -inf) : f32[B, S0]
""",
    )
