"""Visual tokens are dropped after planned layers, in prefill and in decode."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import changed_recipe, program_of, run
from torch import Tensor
from toy_decoder import Prefill, cache_names, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import InvariantError, PlanError
from qpcompile.ir.edit import calls
from qpcompile.ir.operators import SELECT_TOKENS
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.recipe.plan import Cut

Apply = Callable[[Program, InsertTokenCuts], bool]
ALL, HALF = (999_999, 1_000_000), (1, 2)


def planned(*settings: str, fraction: tuple[int, int] = HALF, layer: int = 0, masked: bool = True) -> Program:
    """The toy decoder with a plan to keep `fraction` of the visual tokens after `layer`."""
    recipe = changed_recipe("prune-30", *settings)
    program = program_of(prefill_graph(masked=masked), decode_graph(), recipe=recipe, layers=2)
    Canonicalize().run(program)
    program.stage = "planned"
    numerator, denominator = fraction
    cut = Cut(layer=layer, ratio=numerator / denominator, numerator=numerator, denominator=denominator)
    program.plan = program.plan.changed(cuts=(cut,))
    return program


def visual_feeds(rows: int, length: int, visual: tuple[int, ...]) -> dict[str, Tensor]:
    """Random inputs; row i has visual[i] visual tokens from position 2 on, row 0 begins with a padding token."""
    feeds = toy_feeds(rows, length)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, count in enumerate(visual):
        mask[row, 2 : 2 + count] = True
    return feeds | {
        "visual_mask": mask,
        "valid_mask": feeds["attention_mask"],
        "visual_count": torch.arange(min(visual)),
    }


def next_token(program: Program, first: dict[str, Tensor], feeds: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Decode one token on the caches of prefill."""
    rows, seen = feeds["attention_mask"].shape
    more = {name: value for name, value in first.items() if name.startswith("past")}
    more["attention_mask"] = torch.cat([feeds["attention_mask"], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    more["tokens_seen"] = torch.arange(seen)
    for name in [name for name in first if name.split(".")[0] in ("kept", "alive")]:
        last = torch.full((rows, 1), seen) if name.startswith("kept") else torch.ones(rows, 1, dtype=torch.bool)
        more[name] = torch.cat([first[name], last], dim=1)
    more["inputs_embeds"] = new
    return run(program.graphs[DECODE], **{name.replace(".", "_"): value for name, value in more.items()})


def test_golden_prefill(apply: Apply) -> None:
    program = planned()
    assert apply(program, InsertTokenCuts())
    lines = graph_text(program.graphs[PREFILL]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "token_scores" in line)
    first = next(number for number, line in enumerate(lines) if number > start and "linear" in line)
    kept = [line for line in lines if " = input " in line or line.startswith("return")]
    expecttest.assert_expected_inline(
        "".join(lines[start : first + 1] + kept),
        """\
%38 = qpcompile::token_scores(%31, %31, %18, %25, %15, 0.5, %2, %3, %37, [0.517, 0.317, 0.167, 0.0], 'percentile', 1.0, 99.0, False, False, 0, 1.0, 4, False, 0.0) : f32[B, S0]
%39 = aten::sym_size.int(%2, 0) : int B
%40 = aten::sym_size.int(%2, 1) : int S0
%41 = aten::sym_size.int(%4, 0) : int S1
%42 = operator.mul(%41, 1) : int S1
%43 = operator.add(%42, 1) : int S1+1
%44 = operator.floordiv(%43, 2) : int ((S1+1)//2)
%45 = operator.sub(%41, %44) : int S1-(((S1+1)//2))
%46 = operator.sub(%40, %45) : int S2
%47 = aten::bitwise_not(%2) : bool[B, S0]
%48 = aten::bitwise_and.Tensor(%3, %47) : bool[B, S0]
%49 = aten::sum.dim_IntList(%48, [1]) : i64[B]
%50 = aten::sum.dim_IntList(%2, [1]) : i64[B]
%51 = aten::mul.Tensor(%50, 1) : i64[B]
%52 = aten::add.Tensor(%51, 1) : i64[B]
%53 = aten::div.Tensor_mode(%52, 2, rounding_mode='floor') : i64[B]
%54 = aten::add.Tensor(%49, %53) : i64[B]
%55 = qpcompile::select_tokens(%38, %46, %54) : (i64[B, S2], bool[B, S2])
%56 = operator.getitem(%55, 0) : i64[B, S2]
%57 = operator.getitem(%55, 1) : bool[B, S2]
%58 = aten::unsqueeze(%56, 1) : i64[B, 1, S2]
%59 = aten::unsqueeze(%58, 3) : i64[B, 1, S2, 1]
%60 = aten::sym_size.int(%15, 3) : int S0
%61 = aten::expand(%59, [%39, 1, -1, %60]) : i64[B, 1, S2, S0]
%62 = aten::gather(%15, 2, %61) : bool[B, 1, S2, S0]
%63 = aten::unsqueeze(%56, 1) : i64[B, 1, S2]
%64 = aten::unsqueeze(%63, 2) : i64[B, 1, 1, S2]
%65 = aten::sym_size.int(%62, 2) : int S2
%66 = aten::expand(%64, [%39, 1, %65, -1]) : i64[B, 1, S2, S2]
%67 = aten::gather(%62, 3, %66) : bool[B, 1, S2, S2]
%68 = aten::unsqueeze(%57, 1) : bool[B, 1, S2]
%69 = aten::unsqueeze(%68, 1) : bool[B, 1, 1, S2]
%70 = aten::bitwise_and.Tensor(%67, %69) : bool[B, 1, S2, S2]
%71 = aten::unsqueeze(%56, 2) : i64[B, S2, 1]
%72 = aten::expand(%71, [%39, -1, 8]) : i64[B, S2, 8]
%73 = aten::gather(%31, 1, %72) : f32[B, S2, 8]
%74 = aten::unsqueeze(%56, 1) : i64[B, 1, S2]
%75 = aten::unsqueeze(%74, 3) : i64[B, 1, S2, 1]
%76 = aten::expand(%75, [%39, 1, -1, 4]) : i64[B, 1, S2, 4]
%77 = aten::gather(%21, 2, %76) : f32[B, 1, S2, 4]
%78 = aten::unsqueeze(%56, 1) : i64[B, 1, S2]
%79 = aten::unsqueeze(%78, 3) : i64[B, 1, S2, 1]
%80 = aten::expand(%79, [%39, 1, -1, 4]) : i64[B, 1, S2, 4]
%81 = aten::gather(%24, 2, %80) : f32[B, 1, S2, 4]
@layers.1.self_attn.q_proj.weight : f32[8, 8]
%82 = aten::linear(%73, @layers.1.self_attn.q_proj.weight) : f32[B, S2, 8]
%0 = input inputs_embeds : f32[B, S0, 8]
%1 = input attention_mask : bool[B, S0]
%2 = input visual_mask : bool[B, S0]
%3 = input valid_mask : bool[B, S0]
%4 = input visual_count : i64[S1]
return hidden = %97
return past_key_values.0.key = %77
return past_key_values.0.value = %81
return past_key_values.1.key = %87
return past_key_values.1.value = %90
return kept.0 = %56
return alive.0 = %57
""",  # noqa: E501
    )


def test_golden_decode(apply: Apply) -> None:
    program = planned()
    assert apply(program, InsertTokenCuts())
    lines = graph_text(program.graphs[DECODE]).splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "linear" in line)
    expecttest.assert_expected_inline(
        "".join(lines[: first + 1]),
        """\
graph decode of model
%0 = input inputs_embeds : f32[B, 1, 8]
%1 = input attention_mask : bool[B, S0+1]
%2 = input past_key_values.0.key : f32[B, 1, S1-1, 4]
%3 = input past_key_values.0.value : f32[B, 1, S1-1, 4]
%4 = input past_key_values.1.key : f32[B, 1, S1-1, 4]
%5 = input past_key_values.1.value : f32[B, 1, S1-1, 4]
%6 = input tokens_seen : i64[S0]
%7 = input kept.0 : i64[B, S1]
%8 = input alive.0 : bool[B, S1]
%9 = aten::sym_size.int(%5, 0) : int B
# top
%10 = aten::unsqueeze(%1, 1) : bool[B, 1, S0+1]
%11 = aten::unsqueeze(%10, 2) : bool[B, 1, 1, S0+1]
# layers.0
%12 = aten::sym_size.int(%7, 0) : int B
%13 = aten::unsqueeze(%7, 1) : i64[B, 1, S1]
%14 = aten::unsqueeze(%13, 2) : i64[B, 1, 1, S1]
%15 = aten::expand(%14, [%12, 1, 1, -1]) : i64[B, 1, 1, S1]
%16 = aten::gather(%11, 3, %15) : bool[B, 1, 1, S1]
%17 = aten::unsqueeze(%8, 1) : bool[B, 1, S1]
%18 = aten::unsqueeze(%17, 1) : bool[B, 1, 1, S1]
%19 = aten::bitwise_and.Tensor(%16, %18) : bool[B, 1, 1, S1]
@layers.0.self_attn.q_proj.weight : f32[8, 8]
%20 = aten::linear(%0, @layers.0.self_attn.q_proj.weight) : f32[B, 1, 8]
""",
    )


def test_nothing_to_do(apply: Apply) -> None:
    program = planned()
    program.plan = program.plan.changed(cuts=())
    assert not apply(program, InsertTokenCuts())


@pytest.mark.parametrize("compact", ["true", "false"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_cut_that_keeps_all_changes_no_number(apply: Apply, compact: str, masked: bool) -> None:
    program = planned(f"tokens.compact_scored_layer={compact}", fraction=ALL, masked=masked)
    feeds, new = visual_feeds(2, 8, (3, 3)), toy_feeds(2, 1, 9)["inputs_embeds"]
    if not masked:
        feeds["attention_mask"] = feeds["valid_mask"] = torch.ones(2, 8, dtype=torch.bool)
    expected = run(program.graphs[PREFILL], **feeds)
    assert apply(program, InsertTokenCuts())
    found = run(program.graphs[PREFILL], **feeds)
    assert found["kept.0"].tolist() == [list(range(8))] * 2
    assert found["alive.0"].sum() == feeds["attention_mask"].sum()
    for name, value in expected.items():
        assert (
            torch.equal(found[name][:, -7:], value[:, -7:]) if name == "hidden" else torch.equal(found[name], value)
        ), name
    plain = program_of(prefill_graph(masked=masked), decode_graph(), layers=2)
    past = {name.replace(".", "_"): expected[name] for name in cache_names(2)}
    mask = torch.cat([feeds["attention_mask"], torch.ones(2, 1, dtype=torch.bool)], dim=1)
    wanted = run(plain.graphs[DECODE], inputs_embeds=new, attention_mask=mask, **past)["hidden"]
    assert torch.equal(next_token(program, found, feeds, new)["hidden"], wanted)


def by_masks(
    feeds: dict[str, Tensor], new: Tensor, kept: Tensor, alive: Tensor, compact: bool
) -> tuple[Tensor, Tensor]:
    """The oracle of a cut after layer 0, without a gather: dropped tokens stay, and are masked."""
    model = Prefill()
    rows, length = feeds["attention_mask"].shape
    stays = torch.zeros(rows, length + 1, dtype=torch.bool)
    for row in range(rows):
        stays[row, kept[row][alive[row]]] = True
    stays[:, length] = True
    x = torch.cat([feeds["inputs_embeds"], new], dim=1)
    valid = torch.cat([feeds["attention_mask"], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    causal = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        first = causal & valid[:, None, None]
        if compact:
            first = torch.cat([first[:, :, :length], (first & stays[:, None, None])[:, :, length:]], dim=2)
        x, *_ = model.layers[0](x, first, None)
        x, *_ = model.layers[1](x, causal & stays[:, None, None], None)
    return x[:, :length], x[:, length:]


@pytest.mark.parametrize("visual", [(4, 4), (3, 5)], ids=["as many each", "more in one row"])
@pytest.mark.parametrize("method", ["quota", "random"])
@pytest.mark.parametrize("compact", [True, False])
def test_dropping_is_never_looking_again(apply: Apply, visual: tuple[int, int], method: str, compact: bool) -> None:
    program = planned(f"tokens.method={method}", f"tokens.compact_scored_layer={str(compact).lower()}")
    assert apply(program, InsertTokenCuts())
    feeds, new = visual_feeds(2, 9, visual), toy_feeds(2, 1, 9)["inputs_embeds"]
    first = run(program.graphs[PREFILL], **feeds)
    kept, alive = first["kept.0"], first["alive.0"]
    for row, count in enumerate(visual):
        positions = kept[row][alive[row]]
        assert positions.tolist() == sorted(set(positions.tolist()))
        assert feeds["visual_mask"][row][positions].sum() == -(-count // 2)
        text = feeds["valid_mask"][row] & ~feeds["visual_mask"][row]
        assert set(text.nonzero().flatten().tolist()) <= set(positions.tolist())
    hidden, token = by_masks(feeds, new, kept, alive, compact)
    found = next_token(program, first, feeds, new)
    for row in range(2):
        wanted = hidden[row][kept[row][alive[row]]]
        assert torch.allclose(first["hidden"][row][alive[row]], wanted, atol=1e-6), "prefill"
    assert torch.allclose(found["hidden"], token, atol=1e-6), "decode"
    lengths = [found[f"past_key_values.{layer}.key"].shape[2] for layer in (0, 1)]
    assert lengths == [kept.shape[1] + 1 if compact else 10, kept.shape[1] + 1]


def test_the_score_is_of_the_layer_before_the_cut(apply: Apply) -> None:
    weights = "tokens.weights={inter: 0.0, magnitude: 1.0, intra: 0.0, residual: 0.0}"
    program = planned(weights)
    apply(program, InsertTokenCuts())
    feeds = visual_feeds(2, 12, (6, 6))
    with torch.no_grad():
        mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & feeds["attention_mask"][:, None, None]
        norms = Prefill().layers[0](feeds["inputs_embeds"], mask, None)[0].norm(dim=-1)
    found = run(program.graphs[PREFILL], **feeds)
    for row in range(2):
        largest = set((norms[row, 2:8].topk(3).indices + 2).tolist())
        kept = found["kept.0"][row][found["alive.0"][row]]
        assert largest == set(kept.tolist()) & set(range(2, 8))


def test_random_draw_follows_the_seed() -> None:
    feeds = visual_feeds(1, 30, (20,))
    drawn = []
    for seed in (0, 0, 1):
        program = planned("tokens.method=random", f"tokens.seed={seed}")
        InsertTokenCuts().run(program)
        drawn.append(run(program.graphs[PREFILL], **feeds)["kept.0"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_last_layer_cannot_be_cut_behind() -> None:
    with pytest.raises(PlanError, match="after layer 1: there is no layer after it") as error:
        InsertTokenCuts().run(planned(layer=1))
    assert "candidate_layers" in str(error.value)


def test_layer_without_attention_cannot_score() -> None:
    program = planned()
    for node in program.graphs[PREFILL].nodes:
        if "scaled_dot" in str(node.target):
            node.meta["nn_module_stack"] = {"k": ("", "")}
    with pytest.raises(PlanError, match="layer 0 has 0 attention nodes"):
        InsertTokenCuts().run(program)


def test_hand_broken_graph_is_named(apply: Apply) -> None:
    program = planned()
    apply(program, InsertTokenCuts())
    graph = program.graphs[PREFILL]
    assert len(list(calls(graph, SELECT_TOKENS))) == 1
    graph.inputs = graph.inputs[:-1]
    with pytest.raises(InvariantError, match="prefill: 5 placeholders for 4 inputs") as error:
        verify(program)
    assert error.value.ran == "insert_token_cuts"


@pytest.mark.parametrize("multiple", [1, 8, 64])
@pytest.mark.parametrize("method", ["quota", "divprune"])
def test_kept_tokens_fill_a_multiple(multiple: int, method: str) -> None:
    layer = 0 if method == "quota" else -1
    program = planned(f"tokens.multiple_of={multiple}", f"tokens.method={method}", layer=layer, fraction=(1, 4))
    assert InsertTokenCuts().run(program)
    for length, visual in ((15, 8), (20, 10), (29, 20)):
        feeds = visual_feeds(1, length, (visual,))
        found = run(program.graphs[PREFILL], **feeds)
        share = -(-visual // 4)
        stays = length - visual + share
        alone = min(length, -(-stays // multiple) * multiple)
        kept, alive = found[f"kept.{layer}"], found[f"alive.{layer}"]
        assert kept.shape == alive.shape == (1, alone)
        # The padding token is kept as a dead slot: all other kept tokens are alive.
        assert int(alive.sum()) == alone - 1
        counts = program.plan.visual_tokens(visual, length - visual)
        assert counts[-1] == alone - (length - visual)
    two = run(program.graphs[PREFILL], **visual_feeds(2, 24, (6, 12)))
    kept, alive = two[f"kept.{layer}"], two[f"alive.{layer}"]
    least = min(24, -(-(24 - 6 + 2) // multiple) * multiple)
    surplus = least - 20
    assert kept.shape[1] == least
    # Row 0 has 17 text tokens and padding, row 1 has 12 text tokens.
    assert alive.sum(dim=1).tolist() == [17 + min(6, 2 + surplus), 12 + min(12, 3 + surplus)]


def test_a_later_cut_never_revives_dropped_tokens() -> None:
    program = planned("tokens.multiple_of=8", "tokens.method=random", fraction=(1, 2))
    first = program.plan.cuts[0]
    program.plan = program.plan.changed(cuts=(Cut(layer=-1, ratio=0.75, numerator=3, denominator=4), first))
    assert InsertTokenCuts().run(program)
    found = run(program.graphs[PREFILL], **visual_feeds(2, 26, (7, 15)))
    before, behind = (
        [set(kept[alive].tolist()) for kept, alive in zip(found[f"kept.{layer}"], found[f"alive.{layer}"], strict=True)]
        for layer in (-1, 0)
    )
    assert all(later <= earlier for earlier, later in zip(before, behind, strict=True))
