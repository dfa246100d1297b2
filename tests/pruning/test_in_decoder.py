"""Methods that cut inside the decoder: schedules against the papers, selections against numpy on a toy decoder."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from programs import changed_recipe, program_of, run
from toy_decoder import HEADS, WIDTH, Prefill, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import PlanError
from qpcompile.ir.program import PREFILL, Program
from qpcompile.ir.shapes import add_input, value
from qpcompile.ir.text import graph_text
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.pruning.methods.sparsevlm import list_ratios
from qpcompile.pruning.positions import POSITIONS, find_positions
from qpcompile.recipe.plan import Cut

Array = np.ndarray[Any, Any]
LENGTH, FIRST = 14, 3
# Visual tokens of two rows, from position FIRST on; a row begins with padding if the other one is longer.
VISUAL = (8, 5)


def planned(method: str, *settings: str, layers: int = 32) -> Program:
    """A program of the given depth with the plan of a method."""
    program = program_of(recipe=changed_recipe("none", f"tokens.method={method}", *settings), layers=layers)
    program.stage = "calibrated"
    PlanTokenBudget().run(program)
    return program


def layers_of(program: Program) -> list[int]:
    return [cut.layer for cut in program.plan.cuts]


def mean_tokens(program: Program, visual: int = 576) -> float:
    return sum(counts := program.plan.visual_tokens(visual)) / len(counts)


def test_pyramid_drop_is_the_papers() -> None:
    program = planned("pyramiddrop", "tokens.keep=0.125")
    assert layers_of(program) == [7, 15, 23]
    assert [cut.kept(576) for cut in program.plan.cuts] == [288, 144, 72]
    assert mean_tokens(program) == 270


@pytest.mark.parametrize(("counts", "mean"), [((300, 200, 110), 192), ((303, 110, 36), 128), ((66, 30, 17), 64)])
def test_sparse_vlm_keeps_the_counts_of_its_lists(counts: tuple[int, ...], mean: int) -> None:
    program = planned("sparsevlm", f"tokens.keep={counts[-1] / 576}")
    assert layers_of(program) == [1, 5, 15]
    assert [cut.kept(576) for cut in program.plan.cuts] == list(counts)
    assert abs(mean_tokens(program) - mean) <= 2.5


@pytest.mark.parametrize("cuts", [1, 2, 3, 4])
def test_sparse_vlm_ratios_never_rise_along_the_cuts(cuts: int) -> None:
    for keep in np.linspace(0.001, 1.0, 41):
        ratios = list_ratios(float(keep), cuts)
        assert len(ratios) == cuts and ratios[-1] == keep
        assert all(before >= after for before, after in pairwise(ratios))
        assert all(0 < ratio <= 1 for ratio in ratios)


def test_fastv_cuts_behind_the_second_layer() -> None:
    program = planned("fastv", "tokens.keep=0.5")
    assert [(cut.layer, cut.ratio) for cut in program.plan.cuts] == [(1, 0.5)]
    assert layers_of(planned("fastv", "tokens.keep=0.5", "tokens.candidate_layers=[2]")) == [2]
    with pytest.raises(PlanError, match="fastv cuts once, 2 layers are named"):
        planned("fastv", "tokens.keep=0.5", "tokens.candidate_layers=[2, 3]")


@pytest.mark.parametrize(
    ("method", "layers", "expected"),
    [
        ("pyramiddrop", 8, [1, 3, 5]),
        ("sparsevlm", 8, [0, 1, 3]),
        ("fastv", 8, [1]),
        ("pyramiddrop", 28, [6, 13, 20]),
        ("sparsevlm", 28, [1, 4, 13]),
        ("pyramiddrop", 3, [0, 1]),
        ("sparsevlm", 3, [0, 1]),
        ("fastv", 2, [0]),
    ],
)
def test_layers_follow_the_depth(method: str, layers: int, expected: list[int]) -> None:
    assert layers_of(planned(method, "tokens.keep=0.3", layers=layers)) == expected


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "vtw"])
def test_the_mean_is_what_was_asked(method: str) -> None:
    program = planned(method, "tokens.keep=0.5", "tokens.keep_of=mean")
    assert abs(mean_tokens(program, 100_000) - 50_000) < 3


def test_withdrawal_takes_the_layer_from_the_mean() -> None:
    for keep, layer in ((0.5, 3), (0.3, 1), (0.125, 0), (0.95, 6)):
        program = planned("vtw", f"tokens.keep={keep}", "tokens.keep_of=mean", layers=8)
        (cut,) = program.plan.cuts
        assert (cut.layer, cut.ratio, cut.kept(576)) == (layer, 0.0, 0)
    (cut,) = planned("vtw", "tokens.candidate_layers=[16]").plan.cuts
    assert (cut.layer, cut.kept(576)) == (16, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tokens.keep=0.3"], "exactly one of the layer and the mean"),
        (
            ["tokens.keep=0.3", "tokens.keep_of=mean", "tokens.candidate_layers=[2]"],
            "exactly one of the layer and the mean",
        ),
        (["tokens.keep=0.02", "tokens.keep_of=mean"], "is 0 layers that see the picture"),
        (["tokens.keep=1.0", "tokens.keep_of=mean"], "is 32 layers that see the picture"),
        (["tokens.candidate_layers=[2, 3]"], "vtw cuts once"),
    ],
)
def test_withdrawal_refuses_what_it_cannot_mean(settings: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned("vtw", *settings)


def cut_toy(*settings: str, share: tuple[int, int] = (1, 2), layer: int = 0) -> Program:
    """The toy decoder, cut after `layer` by a method."""
    program = program_of(prefill_graph(), decode_graph(), recipe=changed_recipe("none", *settings), layers=2)
    Canonicalize().run(program)
    program.stage = "planned"
    cut = Cut(layer=layer, ratio=share[0] / share[1], numerator=share[0], denominator=share[1])
    program.plan = program.plan.changed(cuts=(cut,))
    InsertTokenCuts().run(program)
    return program


def feeds() -> dict[str, torch.Tensor]:
    """Two prompts of a toy decoder, the first padded, with pictures of two sizes."""
    given = toy_feeds(2, LENGTH)
    visual = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, count in enumerate(VISUAL):
        visual[row, FIRST : FIRST + count] = True
    return given | {
        "visual_mask": visual,
        "valid_mask": given["attention_mask"],
        "visual_count": torch.arange(min(VISUAL)),
    }


def attention(layer: int, hidden: Array) -> Array:
    """The toy layer's attention over one prompt, mean over heads: f64[S, S]; hidden: f64[S, C]."""
    parts = Prefill().layers[layer].self_attn
    query, key = (
        hidden @ getattr(parts, name).weight.detach().double().numpy().T
        for name in ("q_proj", "k_proj")  # type: ignore[union-attr]
    )
    query = query.reshape(len(hidden), HEADS, WIDTH).swapaxes(0, 1)
    logits = query @ key.T * WIDTH**-0.5
    logits[:, ~np.tri(len(hidden), dtype=bool)] = -np.inf
    parts = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (parts / parts.sum(axis=-1, keepdims=True)).mean(axis=0)


def behind_first_layer(hidden: Array) -> Array:
    """f64[S, C] -> f64[S, C]: the toy decoder's layer 0 on one prompt."""
    with torch.no_grad():
        mask = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()[None, None]
        return Prefill().double().layers[0](torch.from_numpy(hidden)[None], mask, None)[0][0].numpy()


def best(scores: Array, visual: Array, count: int) -> set[int]:
    """The `count` visual positions with the highest scores, ties to the lower one."""
    order = sorted(np.flatnonzero(visual), key=lambda position: (-scores[position], position))
    return set(map(int, order[:count]))


def fastv_by_hand(hidden: Array, visual: Array) -> Array:
    return attention(0, hidden)[-1]


def pyramid_by_hand(hidden: Array, visual: Array) -> Array:
    return attention(1, behind_first_layer(hidden))[-1]


def sparse_by_hand(hidden: Array, visual: Array) -> Array:
    behind = int(np.flatnonzero(visual)[0])
    text = [position for position in range(behind, len(hidden)) if not visual[position]]
    logits = hidden[visual] @ hidden[text].T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    raters = [position for position, share in zip(text, mean, strict=True) if share > mean.mean()]
    assert 0 < len(raters) < len(text)
    return attention(0, hidden)[raters].mean(axis=0)


BY_HAND = {"fastv": fastv_by_hand, "pyramiddrop": pyramid_by_hand, "sparsevlm": sparse_by_hand}


@pytest.mark.parametrize("method", BY_HAND)
def test_the_choice_is_the_formulas(method: str) -> None:
    given = feeds()
    found = run(cut_toy(f"tokens.method={method}", "tokens.keep=0.5").graphs[PREFILL], **given)
    for row, count in enumerate(VISUAL):
        valid = given["valid_mask"][row].numpy()
        start = int(np.flatnonzero(valid)[0])
        hidden, visual = (given[name][row].numpy()[start:] for name in ("inputs_embeds", "visual_mask"))
        expected = best(BY_HAND[method](hidden.astype(np.float64), visual), visual, -(-count // 2))
        kept = {int(each) - start for each in found["kept.0"][row][found["alive.0"][row]]}
        assert kept & set(np.flatnonzero(visual).tolist()) == expected


def test_methods_choose_differently() -> None:
    found = [
        run(cut_toy(f"tokens.method={method}").graphs[PREFILL], **feeds())["kept.0"].tolist() for method in BY_HAND
    ]
    assert len({str(each) for each in found}) == 3


def test_withdrawal_leaves_text_alone() -> None:
    given = feeds()
    found = run(cut_toy("tokens.method=vtw", share=(0, 1)).graphs[PREFILL], **given)
    for row in range(2):
        kept = found["kept.0"][row][found["alive.0"][row]]
        text = given["valid_mask"][row] & ~given["visual_mask"][row]
        assert kept.tolist() == text.nonzero().flatten().tolist()


def test_pyramid_drop_cuts_between_projections_and_attention() -> None:
    graph = cut_toy("tokens.method=pyramiddrop").graphs[PREFILL]
    inside = [
        node
        for node in graph.nodes
        if "layers.1" in str(node.meta.get("nn_module_stack", "")) and node.op != "get_attr"
    ]
    names = [str(node.target).removesuffix(".default") for node in inside]
    short = value(next(node for node in inside if "scaled_dot" in str(node.target))).shape[2]
    steps = [
        f"{name} {'kept' if str(short) in str(tuple(value(node).shape)) else 'all'}"
        for name, node in zip(names, inside, strict=True)
        if name
        in ("aten.linear", "qpcompile.token_scores", "qpcompile.select_tokens", "aten.scaled_dot_product_attention")
        and isinstance(value(node), torch.Tensor)
    ]
    expecttest.assert_expected_inline(
        "\n".join(steps),
        """\
aten.linear all
aten.linear all
aten.linear all
qpcompile.token_scores all
aten.scaled_dot_product_attention kept
aten.linear kept""",
    )
    # The cache of the layer that contains the cut holds the kept tokens only, without another gather.
    for part in ("key", "value"):
        assert str(value(graph.result(f"past_key_values.1.{part}")).shape[2]) == str(short)
    assert "gather" in graph_text(graph)


def test_positions_that_cannot_be_counted_anew_are_refused() -> None:
    with pytest.raises(PlanError, match="no input position_ids") as error:
        cut_toy("tokens.method=fastv", "tokens.position_mode=reindex")
    assert "position_mode: retain" in str(error.value)
    graph = prefill_graph()
    rows, length = value(graph.placeholder("inputs_embeds")).shape[:2]
    add_input(graph, POSITIONS, (3, rows, length), torch.int64)
    with pytest.raises(PlanError, match="positions have 3 dimensions"):
        find_positions(graph)


def test_positions_that_nobody_reads_are_refused() -> None:
    program = program_of(
        prefill_graph(),
        decode_graph(),
        recipe=changed_recipe("none", "tokens.method=random_input", "tokens.position_mode=reindex"),
        layers=2,
    )
    program.stage = "planned"
    program.plan = program.plan.changed(cuts=(Cut(layer=-1, ratio=0.5, numerator=1, denominator=2),))
    graph = program.graphs[PREFILL]
    add_input(graph, POSITIONS, tuple(value(graph.placeholder("inputs_embeds")).shape[:2]), torch.int64)
    with pytest.raises(PlanError, match=r"nothing that the layers after .* read is computed from position_ids"):
        InsertTokenCuts().run(program)
