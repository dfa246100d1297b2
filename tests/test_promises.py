"""Promises 3 and 4 of the architecture, on the tiny LLaVA: pruned decode is exact, and compiling is deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import IMAGE, PAD, Inputs
from programs import captured, changed_recipe, fresh
from torch import Tensor

from qpcompile.capture.capture import capture
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.recompute import check_decode

CUTS = (0, 1)
NEW = 7
PRUNE = ("tokens.candidate_layers=[0, 1]", "tokens.keep=0.4")
# Different summation orders; the logits are of order 1.
TOLERANCE = 2e-5


def compiled(recipe: Recipe, program: Program | None = None) -> Program:
    """The captured LLaVA through every pass, calibrated on two prompts."""
    _, cases, _ = captured()
    program = fresh(recipe) if program is None else program
    run_passes(program, passes([cases["one"], cases["longer"]], 2))
    return program


@pytest.fixture(scope="module")
def pruned() -> Program:
    return compiled(changed_recipe("prune-30", *PRUNE))


@pytest.fixture(scope="module")
def quantized() -> Program:
    return compiled(changed_recipe("quota-30", *PRUNE))


def test_fast_numerics_have_no_float64(quantized: Program, pruned: Program) -> None:
    for program in (quantized, pruned):
        assert program.recipe.numerics == "fast"
        for name, graph in program.graphs.items():
            assert "f64" not in graph_text(graph), name


def answer(machine: Machine, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Ids of the new tokens i64[B, NEW] and their logits f32[B, NEW, V]."""
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = machine.generate(**inputs, **options)
    return result.sequences[:, -NEW:], torch.stack(result.logits, dim=1)


def stacked(rows: Sequence[Inputs]) -> Inputs:
    """Prompts as one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}
    for key, fill in (("input_ids", PAD), ("attention_mask", 0)):
        parts = [torch.nn.functional.pad(row[key], (width - row[key].shape[1], 0), value=fill) for row in rows]
        batch[key] = torch.cat(parts)
    return batch


def there_by_layer(cache: Any, prompt_mask: Tensor, new: int) -> list[tuple[Tensor, Tensor]]:
    """Per layer, which tokens it runs on and which are kept after it: bool[B, S + new] twice."""
    rows, length = prompt_mask.shape
    current = torch.cat([prompt_mask.bool(), torch.ones(rows, new, dtype=torch.bool)], dim=1)
    found = []
    for layer in range(-1, 3):
        after = current
        if layer in cache.kept:
            after = torch.zeros_like(current)
            for row in range(rows):
                after[row, cache.kept[layer][row][cache.alive[layer][row]]] = True
            after[:, length:] = True
        found.append((current, after))
        current = after
    return found[1:]


def recomputed(inputs: Inputs, tokens: Tensor, there: list[tuple[Tensor, Tensor]], reindex: bool = False) -> Tensor:
    """Logits f32[B, NEW, V] of eager layers on the whole sequence at once: no cache, no gather, no graph.

    A dropped token stays in the sequence, at its position, and is masked where required: row i of a prompt attends to
    the tokens that the layer ran on; a new token attends to the tokens kept by the cut after that very layer, since the
    cache of that layer is reduced too. reindex: a layer counts the tokens that it runs on.
    """
    model, _, _ = captured()
    ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :-1])], dim=1)
    total, length = ids.shape[1], inputs["input_ids"].shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    is_new = (torch.arange(total) >= length)[None, :, None]
    language: Any = model.model.language_model
    with torch.no_grad():
        hidden = model.get_input_embeddings()(ids)
        features: Any = model.get_image_features(pixel_values=inputs["pixel_values"])  # type: ignore[operator]
        hidden[ids == IMAGE] = torch.cat([part.reshape(-1, part.shape[-1]) for part in features.pooler_output])
        for layer, (now, after) in zip(language.layers, there, strict=True):
            positions = ((now if reindex else valid).cumsum(dim=1) - 1).clamp(min=0)
            mask = causal & torch.where(is_new, after[:, None, :], now[:, None, :])
            rotary = language.rotary_emb(hidden, positions)
            hidden = layer(hidden, attention_mask=mask[:, None], position_ids=positions, position_embeddings=rotary)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return model.lm_head(language.norm(hidden))[:, -NEW:]  # type: ignore[operator]


def check_honest(program: Program, inputs: Inputs) -> None:
    """Decode on reduced caches gives the logits of a recomputation in which dropped tokens are masked."""
    machine = Machine(program)
    tokens, logits = answer(machine, inputs)
    assert machine.last is not None
    cache = machine.last
    length = inputs["input_ids"].shape[1]
    visual = (inputs["input_ids"] == IMAGE).sum(dim=1)
    for cut in program.plan.cuts:
        for row, count in enumerate(visual.tolist()):
            positions = cache.kept[cut.layer][row][cache.alive[cut.layer][row]]
            prompt = positions[positions < length]
            is_visual = inputs["input_ids"][row][prompt] == IMAGE
            assert int(is_visual.sum()) == cut.kept(count) < count
            assert int((~is_visual).sum()) == int(inputs["attention_mask"][row].sum()) - count, "text was dropped"
    there = there_by_layer(cache, inputs["attention_mask"], NEW - 1)
    check_decode(program, machine, inputs)  # the final check of every compile agrees
    expected = recomputed(inputs, tokens, there, program.recipe.tokens.position_mode == "reindex")
    assert torch.equal(expected.argmax(dim=-1), tokens)
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["one", "longer", "padded", "pictures", "one and two pictures"])
def test_pruned_decode_is_recomputing_on_the_kept_tokens(pruned: Program, case: str) -> None:
    _, cases, _ = captured()
    check_honest(pruned, cases[case] if case in cases else stacked([cases["one"], cases["pictures"]]))


# Settings of each method that selects inside the decoder, and of one that selects before it.
METHODS = {
    "quota": ["tokens.candidate_layers=[0, 1]"],
    "fastv": ["tokens.candidate_layers=[0]"],
    "pyramiddrop": ["tokens.candidate_layers=[0, 1]"],
    "sparsevlm": ["tokens.candidate_layers=[0, 1]"],
    "vtw": ["tokens.candidate_layers=[0]"],
    "random_input": [],
}


# Renumbering is the same for every method: one that cuts twice stands for all by default.
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *((method, "retain") for method in METHODS),
        ("quota", "reindex"),
        *(pytest.param(method, "reindex", marks=pytest.mark.slow) for method in METHODS if method != "quota"),
    ],
)
def test_every_method_decodes_honestly(method: str, mode: str) -> None:
    _, cases, _ = captured()
    keys = [f"tokens.method={method}", "tokens.keep=0.4", f"tokens.position_mode={mode}", *METHODS[method]]
    program = compiled(changed_recipe("prune-30", *keys))
    for inputs in (cases["padded"], stacked([cases["one"], cases["pictures"]])):
        check_honest(program, inputs)


def test_counting_anew_before_the_decoder_is_the_shorter_prompt() -> None:
    model, cases, _ = captured()
    keys = ("tokens.method=random_input", "tokens.keep=0.4", "tokens.position_mode=reindex")
    machine = Machine(compiled(changed_recipe("prune-30", *keys)))
    tokens, logits = answer(machine, cases["longer"])
    assert machine.last is not None
    prompt = machine.last.kept[-1][0][: -(NEW - 1)]
    ids = cases["longer"]["input_ids"]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        features: Any = model.get_image_features(pixel_values=cases["longer"]["pixel_values"])  # type: ignore[operator]
        embeddings[ids == IMAGE] = torch.cat([part.reshape(-1, part.shape[-1]) for part in features.pooler_output])
        text = model.get_input_embeddings()(tokens[:, :-1])
        language: Any = model.model.language_model
        hidden = language(inputs_embeds=torch.cat([embeddings[:, prompt], text], dim=1)).last_hidden_state
        expected = model.lm_head(hidden)[:, -NEW:]  # type: ignore[operator]
    assert prompt.numel() < ids.shape[1]
    assert (logits - expected).abs().max() < TOLERANCE


def test_pruning_changes_the_answer(pruned: Program) -> None:
    model, cases, _ = captured()
    with torch.no_grad():
        full = model(**cases["one"]).logits[:, -1]  # type: ignore[operator]
    _, logits = answer(Machine(pruned), cases["one"])
    assert (logits[:, 0] - full).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["pruned", "quantized"])
def test_a_prompt_answers_the_same_alone_and_in_a_batch(kind: str, request: pytest.FixtureRequest) -> None:
    _, cases, _ = captured()
    machine = Machine(request.getfixturevalue(kind))
    rows = [cases["one"], cases["pictures"], cases["longer"]]
    together, logits = answer(machine, stacked(rows))
    assert machine.last is not None
    kept, alive = machine.last.kept, machine.last.alive
    width = max(row["input_ids"].shape[1] for row in rows)
    for number, row in enumerate(rows):
        alone, own = answer(machine, row)
        assert torch.equal(alone[0], together[number])
        assert (own[0] - logits[number]).abs().max() < TOLERANCE
        shift = width - row["input_ids"].shape[1]
        for layer in CUTS:
            found = kept[layer][number][alive[layer][number]] - shift
            assert torch.equal(found, machine.last.kept[layer][0]), "the same tokens are kept"


def weights(program: Program) -> dict[tuple[str, str], Tensor]:
    reads = [
        (graph, str(node.target)) for graph in program.graphs.values() for node in graph.nodes if node.op == "get_attr"
    ]
    return {(graph.name, name): get_tensor(graph.module, name) for graph, name in reads}


@pytest.mark.timeout(900)  # a separate capture and compile
def test_two_compiles_are_equal(quantized: Program) -> None:
    model, cases, _ = captured()
    again = capture(model, cases["one"], quantized.recipe)
    entries = again.layers
    again.plan = Plan(recipe=quantized.recipe, layers=entries)
    compiled(quantized.recipe, again)
    assert again.plan.to_yaml() == quantized.plan.to_yaml()
    assert {name: graph_text(graph) for name, graph in again.graphs.items()} == {
        name: graph_text(graph) for name, graph in quantized.graphs.items()
    }
    first, second = weights(quantized), weights(again)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    results = []
    for program in (quantized, again):
        machine = Machine(program)
        tokens, logits = answer(machine, cases["padded"])
        assert machine.last is not None
        results.append([tokens, logits, *machine.last.kept.values(), *machine.last.tensors.values()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_plan_reads_back_as_it_is(quantized: Program) -> None:
    assert Plan.from_yaml(quantized.plan.to_yaml()) == quantized.plan


def test_codes_of_survivors_do_not_change_when_others_go(quantized: Program) -> None:
    _, cases, _ = captured()
    uncut = compiled(changed_recipe("quota-30", *PRUNE, "tokens.compact_scored_layer=false"))
    caches = [Machine(program).prefill(cases["padded"]) for program in (quantized, uncut)]
    for kind in ("codes", "affine"):
        for part in ("key", "value"):
            name = f"past_key_values.0.{part}.{kind}"
            compact, whole = (cache.tensors[name] for cache in caches)
            index = caches[0].kept[0][:, None, :, None].expand(-1, *compact.shape[1:2], -1, compact.shape[3])
            assert compact.shape[2] < whole.shape[2] == cases["padded"]["input_ids"].shape[1]
            assert torch.equal(compact, whole.gather(2, index)), name


def test_decoder_weights_take_at_most_three_tenths_of_fp16(quantized: Program) -> None:
    _, _, program = captured()
    for name in (PREFILL, DECODE):
        graph = program.graphs[name]
        linears = [str(node.args[1].target) for node in graph.nodes if "linear" in str(node.target)]  # type: ignore[union-attr]
        assert len(linears) == 3 * 7
        plain = sum(2 * get_tensor(graph.module, weight).numel() for weight in linears)
        module = quantized.graphs[name].module
        # Queries, keys and values are one product, and so are gate and up projections.
        products = list(calls(quantized.graphs[name], LINEAR_INT))
        assert len(products) == 3 * 4
        held = [get_tensor(module, str(each.target)) for node in products for each in node.args[2:4]]  # type: ignore[union-attr]
        assert sum(tensor.numel() * tensor.element_size() for tensor in held) <= 0.30 * plain
        names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        assert not names & set(linears), "the float weights are still there"
