"""What cross-attention reads is cut by the token budget, in prefill and in decode; text is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import changed_recipe, program_of, run
from torch import Tensor
from toy_states import (
    CACHED,
    CHANNELS,
    WIDTH,
    Decoder,
    Pictures,
    Pixels,
    Prefill,
    Unmasked,
    pixels_graphs,
    states_decode,
    states_prefill,
)

from qpcompile.emit.artifact.agreement import of_states
from qpcompile.errors import PlanError
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.measure_sensitivity import MeasureSensitivity
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.pruning.states import check_states, find_states
from qpcompile.runtime.prepare import PICTURES, PROMPT

Apply = Callable[[Program, Any], bool]
CLOSED = torch.finfo(torch.float32).min


def planned(prefill: Graph, decode: Graph, *settings: str, preset: str = "prune-30") -> Program:
    """A program of toy graphs, with its token budget planned."""
    program = program_of(prefill, decode, recipe=changed_recipe(preset, *settings), layers=2)
    Canonicalize().run(program)
    program.stage = "calibrated"
    PlanTokenBudget().run(program)
    program.stage = "planned"
    return program


def feeds(rows: int, tokens: int, states: int, seed: int = 0) -> dict[str, Tensor]:
    """Random embeddings and states."""
    made = torch.Generator().manual_seed(seed)
    return {
        "inputs_embeds": torch.randn(rows, tokens, WIDTH, generator=made),
        "states": torch.randn(rows, states, CHANNELS, generator=made),
    }


def next_step(program: Program, first: dict[str, Tensor], new: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of one more token, on what prefill has cached."""
    more = {name.replace(".", "_"): tensor for name, tensor in first.items() if name.startswith("past")}
    return run(program.graphs[DECODE], inputs_embeds=new, states_mask=mask, **more)["hidden"]


def test_golden(apply: Apply) -> None:
    program = planned(states_prefill(PROMPT), states_decode(), "tokens.method=random")
    assert apply(program, InsertTokenCuts())
    lines = graph_text(program.graphs[PREFILL]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "select_tokens" in line)
    told = [line for line in lines if " = input " in line or line.startswith("return")]
    expecttest.assert_expected_inline(
        "".join(lines[start : start + 26] + told),
        """\
%47 = qpcompile::select_tokens(%46, %24, %33) : (i64[B, S3], bool[B, S3])
%48 = operator.getitem(%47, 0) : i64[B, S3]
%49 = operator.getitem(%47, 1) : bool[B, S3]
%50 = aten::unsqueeze(%48, 2) : i64[B, S3, 1]
%51 = aten::expand(%50, [%9, -1, 6]) : i64[B, S3, 6]
%52 = aten::gather(%1, 1, %51) : f32[B, S3, 6]
%53 = aten::arange(%9) : i64[B]
%54 = aten::unsqueeze(%53, 1) : i64[B, 1]
%55 = aten::index.Tensor(%2, [%54, %48]) : i64[B, S3]
%56 = aten::to.dtype(%49, i64) : i64[B, S3]
%57 = aten::mul.Tensor(%55, %56) : i64[B, S3]
%58 = aten::sym_size.int(%52, 1) : int S3
# top
%59 = aten::arange(%58, device=cpu, pin_memory=False) : i64[S3]
%60 = aten::to.dtype(%57, bool) : bool[B, S3]
%61 = aten::unsqueeze(%59, 0) : i64[1, S3]
%62 = aten::index.Tensor(%60, [%8, %61]) : bool[B, S3]
%63 = aten::unsqueeze(%62, 1) : bool[B, 1, S3]
%64 = aten::unsqueeze(%63, 2) : bool[B, 1, 1, S3]
%65 = aten::expand(%64, [-1, -1, %5, -1]) : bool[B, 1, S0, S3]
# layers.0
@layers.0.cross_attn.k_proj.weight : f32[8, 6]
%66 = aten::linear(%52, @layers.0.cross_attn.k_proj.weight) : f32[B, S3, 8]
%67 = aten::view(%66, [%6, -1, 1, 8]) : f32[B, S3, 1, 8]
%68 = aten::transpose.int(%67, 1, 2) : f32[B, 1, S3, 8]
@layers.0.cross_attn.v_proj.weight : f32[8, 6]
%0 = input inputs_embeds : f32[B, S0, 8]
%1 = input states : f32[B, S1, 6]
%2 = input states_mask : i64[B, S1]
%3 = input visual_mask : bool[B, S1]
%4 = input visual_count : i64[S2]
return hidden = %89
return past_states.0.cross.key = %68
return past_states.0.cross.value = %71
return past_states.1.cross.key = %80
return past_states.1.cross.value = %83
return past_states.0.cross.kept = %48
return past_states.0.cross.alive = %49
""",
    )
    expecttest.assert_expected_inline(
        graph_text(program.graphs[DECODE]),
        """\
graph decode of model
%0 = input inputs_embeds : f32[B, 1, 8]
%1 = input states_mask : i64[B, S0]
%2 = input past_states.0.cross.key : f32[B, 1, S1, 8]
%3 = input past_states.0.cross.value : f32[B, 1, S1, 8]
%4 = input past_states.1.cross.key : f32[B, 1, S1, 8]
%5 = input past_states.1.cross.value : f32[B, 1, S1, 8]
%6 = input past_states.0.cross.kept : i64[B, S1]
%7 = input past_states.0.cross.alive : bool[B, S1]
%8 = aten::sym_size.int(%6, 0) : int B
%9 = aten::arange(%8) : i64[B]
%10 = aten::unsqueeze(%9, 1) : i64[B, 1]
%11 = aten::index.Tensor(%1, [%10, %6]) : i64[B, S1]
%12 = aten::to.dtype(%7, i64) : i64[B, S1]
%13 = aten::mul.Tensor(%11, %12) : i64[B, S1]
%14 = aten::sym_size.int(%1, 0) : int B
%15 = aten::sym_size.int(%5, 2) : int S1
# top
%16 = aten::arange(%14, device=cpu, pin_memory=False) : i64[B]
%17 = aten::arange(%15, device=cpu, pin_memory=False) : i64[S1]
%18 = aten::to.dtype(%13, bool) : bool[B, S1]
%19 = aten::unsqueeze(%16, 1) : i64[B, 1]
%20 = aten::unsqueeze(%17, 0) : i64[1, S1]
%21 = aten::index.Tensor(%18, [%19, %20]) : bool[B, S1]
%22 = aten::unsqueeze(%21, 1) : bool[B, 1, S1]
%23 = aten::unsqueeze(%22, 2) : bool[B, 1, 1, S1]
%24 = aten::expand(%23, [-1, -1, 1, -1]) : bool[B, 1, 1, S1]
# layers.0
@layers.0.cross_attn.q_proj.weight : f32[8, 8]
%25 = aten::linear(%0, @layers.0.cross_attn.q_proj.weight) : f32[B, 1, 8]
%26 = aten::unsqueeze(%25, 1) : f32[B, 1, 1, 8]
%27 = aten::scaled_dot_product_attention(%26, %2, %3, %24) : f32[B, 1, 1, 8]
%28 = aten::select.int(%27, 1, 0) : f32[B, 1, 8]
@layers.0.cross_attn.o_proj.weight : f32[8, 8]
%29 = aten::linear(%28, @layers.0.cross_attn.o_proj.weight) : f32[B, 1, 8]
%30 = aten::add.Tensor(%0, %29) : f32[B, 1, 8]
# layers.1
@layers.1.cross_attn.q_proj.weight : f32[8, 8]
%31 = aten::linear(%30, @layers.1.cross_attn.q_proj.weight) : f32[B, 1, 8]
%32 = aten::unsqueeze(%31, 1) : f32[B, 1, 1, 8]
%33 = aten::scaled_dot_product_attention(%32, %4, %5, %24) : f32[B, 1, 1, 8]
%34 = aten::select.int(%33, 1, 0) : f32[B, 1, 8]
@layers.1.cross_attn.o_proj.weight : f32[8, 8]
%35 = aten::linear(%34, @layers.1.cross_attn.o_proj.weight) : f32[B, 1, 8]
%36 = aten::add.Tensor(%30, %35) : f32[B, 1, 8]
return hidden = %36
return past_states.0.cross.key = %2
return past_states.0.cross.value = %3
return past_states.1.cross.key = %4
return past_states.1.cross.value = %5
return past_states.0.cross.kept = %6
return past_states.0.cross.alive = %7
""",
    )


@pytest.mark.parametrize("method", ["quota", "qapruner", "trim"])
def test_text_is_kept_and_dropping_is_never_looking_again(apply: Apply, method: str) -> None:
    """States of a prompt: the cut graphs answer as the others do with the dropped states masked."""
    whole = program_of(states_prefill(PROMPT), states_decode(), layers=2)
    program = planned(states_prefill(PROMPT), states_decode(), f"tokens.method={method}", "tokens.keep=0.4")
    assert apply(program, InsertTokenCuts())
    given = feeds(2, 3, 11) | {"states_mask": torch.ones(2, 11, dtype=torch.long)}
    given["states_mask"][0, :2] = 0
    visual = torch.zeros(2, 11, dtype=torch.bool)
    visual[0, 3:8], visual[1, 1:10] = True, True
    marks = {"visual_mask": visual, "visual_count": torch.arange(5)}
    cut = run(program.graphs[PREFILL], **given, **marks)
    kept, alive = cut["past_states.0.cross.kept"], cut["past_states.0.cross.alive"]
    # 11 - (5 - 2) slots; a row keeps its text, and ceil(0.4 * 5) or ceil(0.4 * 9) of its visual states.
    assert kept.shape == (2, 8) and alive.sum(dim=1).tolist() == [4 + 2, 2 + 4]
    seen = torch.zeros(2, 11, dtype=torch.bool)
    for row in range(2):
        seen[row, kept[row, alive[row]]] = True
    assert torch.equal(seen & ~visual, given["states_mask"].bool() & ~visual)
    assert cut[CACHED[0]].shape == (2, 1, 8, WIDTH)
    masked = run(whole.graphs[PREFILL], **given | {"states_mask": seen.long()})
    torch.testing.assert_close(cut["hidden"], masked["hidden"])
    new = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    found = next_step(program, cut, new, given["states_mask"])
    torch.testing.assert_close(found, next_step(whole, masked, new, seen.long()))


def test_pictures_that_are_missing_are_not_kept(apply: Apply) -> None:
    """States of three pictures a row, some of which are missing; tokens before the first picture see them all."""
    whole = program_of(states_prefill(PICTURES, Pictures), states_decode(4), layers=2)
    program = planned(states_prefill(PICTURES, Pictures), states_decode(4), "tokens.keep=0.5")
    assert apply(program, InsertTokenCuts())
    made = torch.Generator().manual_seed(2)
    given = feeds(2, 5, 12) | {"states": torch.randn(6, 4, CHANNELS, generator=made)}
    mask = torch.full((2, 1, 5, 12), CLOSED)
    mask[:, :, :2] = 0.0  # before the first picture: opened, as some families do
    mask[0, :, 2:, 4:8], mask[1, :, 2:4], mask[1, :, 4, :8] = 0.0, 0.0, 0.0
    visual, valid = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    visual[:, 2], valid[1, 0] = True, False
    cut = run(program.graphs[PREFILL], **given, states_mask=mask, visual_mask=visual, valid_mask=valid)
    kept, alive = cut["past_states.0.cross.kept"], cut["past_states.0.cross.alive"]
    assert kept.shape == (2, 6) and alive.sum(dim=1).tolist() == [2, 6]
    assert all(4 <= number < 8 for number in kept[0, alive[0]].tolist())
    closed = torch.ones(2, 12, dtype=torch.bool)
    for row in range(2):
        closed[row, kept[row, alive[row]]] = False
    hidden = mask.masked_fill(closed[:, None, None], CLOSED)
    masked = run(whole.graphs[PREFILL], **given | {"states_mask": hidden})
    torch.testing.assert_close(cut["hidden"][:, 2:], masked["hidden"][:, 2:])
    new, last = torch.randn(2, 1, WIDTH, generator=made), mask[:, :, -1:]
    found = next_step(program, cut, new, last)
    torch.testing.assert_close(found, next_step(whole, masked, new, hidden[:, :, -1:]))


def test_states_that_a_decoder_computes_are_cut_in_every_step(apply: Apply) -> None:
    program = planned(*pixels_graphs(), "tokens.keep=0.4")
    assert "what the decoder makes of pixel_values is cut" in program.plan.waived[0]
    assert apply(program, InsertTokenCuts())
    made, model = torch.Generator().manual_seed(3), Pixels().eval()
    given = {
        "inputs_embeds": torch.randn(2, 4, WIDTH, generator=made),
        "pixel_values": torch.randn(2, 3, 4, CHANNELS, generator=made),
        "seen": torch.ones(2, 4, 3, dtype=torch.long),
    }
    given["seen"][0, :, 1] = 0
    marks = {"visual_mask": torch.zeros(2, 4, dtype=torch.bool), "valid_mask": torch.ones(2, 4, dtype=torch.bool)}
    cut = run(program.graphs[PREFILL], **given, **marks)
    kept, alive = cut["past_states.0.cross.kept"], cut["past_states.0.cross.alive"]
    assert kept.shape == (2, 5) and alive.sum(dim=1).tolist() == [4, 5]
    assert not any(4 <= number < 8 for number in kept[0, alive[0]].tolist())
    with torch.no_grad():
        states = model.tower(given["pixel_values"])
        assert torch.equal(cut["encoded"], states), "what is given to the next step is whole"
        closed = torch.zeros(2, 1, 1, 12)
        for row in range(2):
            hides = torch.ones(12, dtype=torch.bool)
            hides[kept[row, alive[row]]] = False
            closed[row, :, :, hides] = CLOSED
        expected = model.run(given["inputs_embeds"], states.flatten(1, 2), (), closed)[0]
        torch.testing.assert_close(cut["hidden"], expected)
        new = torch.randn(2, 1, WIDTH, generator=made)
        step = {"inputs_embeds": new, "encoded": states, "seen": given["seen"][:, -1:]}
        more = {name.replace(".", "_"): tensor for name, tensor in cut.items() if name.startswith("past")}
        found = run(program.graphs[DECODE], **step, **more)["hidden"]
        torch.testing.assert_close(found, model.run(new, states.flatten(1, 2), (), closed)[0])


def test_rows_get_the_same_states_alone_and_in_a_batch(apply: Apply) -> None:
    program = planned(states_prefill(PICTURES, Unmasked), states_decode(), "tokens.multiple_of=4")
    assert apply(program, InsertTokenCuts())
    given = feeds(3, 4, 18)
    marks = {"visual_mask": torch.zeros(3, 4, dtype=torch.bool), "valid_mask": torch.ones(3, 4, dtype=torch.bool)}
    together = run(program.graphs[PREFILL], **given, **marks)
    assert together["past_states.0.cross.kept"].shape == (3, 8)  # 6 of 18, to a multiple of 4
    for row in range(3):
        own = {name: tensor[row : row + 1] for name, tensor in (given | marks).items()}
        alone = run(program.graphs[PREFILL], **own)
        assert torch.equal(alone["past_states.0.cross.kept"][0], together["past_states.0.cross.kept"][row])


def test_states_that_are_attended_to_most_are_kept() -> None:
    """inter alone: the attention that a state gets from the queries of the first layer that reads states."""
    weights = ("tokens.weights.inter=1", "tokens.weights.magnitude=0", "tokens.weights.intra=0")
    program = planned(states_prefill(PICTURES, Unmasked), states_decode(), *weights)
    InsertTokenCuts().run(program)
    given = feeds(1, 4, 10)
    valid = torch.tensor([[False, True, True, True]])
    marks = {"visual_mask": torch.zeros(1, 4, dtype=torch.bool), "valid_mask": valid}
    kept = run(program.graphs[PREFILL], **given, **marks)["past_states.0.cross.kept"][0]
    cross: Any = Unmasked().layers[0].cross_attn
    with torch.no_grad():
        shares = (cross.q_proj(given["inputs_embeds"]) @ cross.k_proj(given["states"]).mT / WIDTH**0.5).softmax(-1)
    assert kept.tolist() == sorted(shares[0, 1:].sum(dim=0).topk(3).indices.tolist())


def test_the_plan_says_what_is_cut() -> None:
    program = planned(states_prefill(PICTURES, Unmasked), states_decode(), "tokens.queries=last")
    (cut,) = program.plan.cuts
    assert (cut.layer, cut.ratio, cut.states, cut.place) == (-1, 0.3, "states", "of states, before the decoder")
    assert program.plan.candidate_layers == ()
    assert [line.partition(":")[0] for line in program.plan.waived] == ["layers", "intra", "queries"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"states": None}, "its cut of states is not that of the graphs"),
        ({"states": "pixels"}, "no cut of pixels"),
        ({"layer": 0}, "no cut of states"),
    ],
)
def test_a_folder_with_another_cut_contradicts_itself(changes: dict[str, Any], reason: str | None) -> None:
    program = planned(states_prefill(PICTURES, Unmasked), states_decode())
    InsertTokenCuts().run(program)
    program.plan = program.plan.changed(cuts=tuple(cut.model_copy(update=changes) for cut in program.plan.cuts))
    found = [what for _, what in of_states(program)]
    assert not found if reason is None else len(found) == 1 and reason in found[0]


def test_layers_are_not_measured() -> None:
    program = program_of(states_prefill(PICTURES, Unmasked), states_decode(), recipe="prune-30", layers=2)
    assert not MeasureSensitivity([{}], 1).run(program)


@pytest.mark.parametrize(
    ("kind", "of", "numbered", "reason"),
    [
        (Prefill, None, False, "which rows of states are of pictures is not known"),
        (Prefill, PROMPT, True, "depends on the place of a row in states"),
        (Unmasked, PROMPT, False, "no mask could hide"),
    ],
)
def test_states_that_cannot_be_cut(kind: type[Decoder], of: str | None, numbered: bool, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        InsertTokenCuts().run(planned(states_prefill(of, kind, numbered), states_decode()))


def test_states_that_a_decoder_numbers_cannot_be_cut() -> None:
    with pytest.raises(PlanError, match="depends on the place of a row in pixel_values"):
        planned(*pixels_graphs(numbered=True))


@pytest.mark.parametrize("method", ["fastv", "joint", "visionzip", "trim"])
def test_methods_without_a_score_are_refused_before_any_pass(method: str) -> None:
    graphs = states_prefill(PICTURES, Unmasked), states_decode()
    with pytest.raises(PlanError, match=method) as caught:
        check_states(program_of(*graphs, recipe=changed_recipe("prune-30", f"tokens.method={method}"), layers=2))
    assert caught.value.do is not None and "divprune" in caught.value.do


def test_a_score_of_nothing_is_refused() -> None:
    weights = ("tokens.weights.inter=0", "tokens.weights.magnitude=0")
    with pytest.raises(PlanError, match="intra cannot score states"):
        planned(states_prefill(PICTURES, Unmasked), states_decode(), *weights)


def test_a_decoder_without_cross_attention_has_no_states() -> None:
    assert find_states(program_of().graphs[PREFILL]) is None
