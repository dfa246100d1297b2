"""Promise 3: decoding with pruned caches answers as if attention masks hid the dropped tokens, in every family."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, VISION_END, VISION_START, Cases, Inputs
from transformers import PreTrainedModel

from qpcompile.capture.capture import capture
from qpcompile.errors import PlanError
from qpcompile.ir.edit import clone
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import Cut, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.machine import Machine

NEW_TOKENS = 4
# Different summation orders; the logits are of order 1. A wrong token, mask or position changes them by 0.01 and more.
TOLERANCE = 1e-4
CUTS = ("tokens.method=random", "tokens.keep=0.3", "tokens.candidate_layers=[0, 1]")
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]
TYPES = ("token_type_ids", "mm_token_type_ids")
Answer = tuple[torch.Tensor, torch.Tensor]

# By default the most unusual one: 3-axis positions, features added inside the decoder. Plain ones are in
# test_promises.py, the others run with -m slow.
KINDS = ("qwen3_vl",)
ALL = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in FAMILIES]


@functools.cache
def captured(name: str) -> tuple[PreTrainedModel, Cases, Program]:
    """A family's model, its prompts and the program traced from the first of them."""
    model, cases = FAMILIES[name]()
    return model, cases, capture(model, cases["one"], Recipe.load("none"))


def with_types(cases: Cases, case: str) -> Inputs:
    """A prompt with token types if the family has them: without, prompt and answer cannot be distinguished."""
    typed = {key for inputs in cases.values() for key in TYPES if key in inputs}
    return {key: torch.zeros_like(cases[case]["input_ids"]) for key in typed} | cases[case]


def compiled(program: Program, recipe: Recipe, samples: tuple[Inputs, ...] = ()) -> Program:
    """A copy of the captured program, compiled by a recipe."""
    graphs = {name: clone(graph) for name, graph in program.graphs.items()}
    layers = program.layers
    plan = Plan(recipe=recipe, layers=layers)
    ours = Program(graphs, copy.deepcopy(program.host), program.layers, recipe, plan)
    run_passes(ours, passes(samples, len(samples)))
    return ours


def answer(model: PreTrainedModel | Machine, inputs: Inputs, new: int = NEW_TOKENS) -> Answer:
    """The greedy answer without placeholder tokens: its ids i64[B, new] and their logits f32[B, new, V]."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": SPECIAL}
    result: Any = model.generate(**inputs, max_new_tokens=new, **options)  # type: ignore[operator]
    return result.sequences[:, -new:], torch.stack(result.logits, dim=1)


def check_same(found: Answer, expected: Answer, label: str) -> None:
    """The same tokens, and logits within the tolerance."""
    difference = (found[1] - expected[1]).abs().max()
    assert difference < TOLERANCE, f"{label}: logits differ by {difference}"
    assert torch.equal(found[0], expected[0]), label


def extended(inputs: Inputs, ids: torch.Tensor) -> Inputs:
    """The prompt with `ids: i64[B, n]` appended."""
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids], dim=1))
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    for key in TYPES:
        if key in inputs:
            # Without a separate type for pictures, type 0 is a bidirectional prefix: answers are type 1.
            kind = int(not inputs[key].any())
            longer[key] = torch.cat([inputs[key], torch.full_like(ids, kind)], dim=1)
    return longer


def row_alone(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch with one picture per row, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    alone |= {key: alone[key][:, real] for key in ("input_ids", "attention_mask", *TYPES) if key in alone}
    if "image_grid_thw" in inputs:
        alone["pixel_values"] = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=1).tolist())[row]
    return alone


def check_selection(inputs: Inputs, cache: CompiledCache, cuts: tuple[Cut, ...], label: str) -> None:
    """After every cut each row has its text and its share of its own visual tokens, and caches of that length."""
    visual = inputs["input_ids"] == IMAGE
    text = inputs["attention_mask"].bool() & ~visual
    for cut in cuts:
        shown = shown_tokens(inputs["input_ids"], cache, cut.layer)
        shares = [-(-own * cut.numerator // cut.denominator) for own in visual.sum(dim=1).tolist()]
        assert (shown & visual).sum(dim=1).tolist() == shares, label
        assert torch.equal(shown & ~visual, text), label


def check_lengths(program: Program, cache: CompiledCache, tensor: str, label: str) -> None:
    """Every layer's cache has the length after the last cut before it, or after its own cut if it is compacted."""
    offset = int(not program.recipe.tokens.compact_scored_layer)
    for layer in program.layers:
        slots = [cache.kept[cut.layer].shape[1] for cut in program.plan.cuts if cut.layer + offset <= layer.index]
        found = cache.tensors[f"past_key_values.{layer.index}.{tensor}"].shape[2]
        assert found == [cache.seen, *slots][-1], f"{label}, layer {layer.index}"
    kept = [cache.kept[cut.layer].shape[1] for cut in program.plan.cuts]
    assert [cache.seen, *kept] == sorted([cache.seen, *kept], reverse=True) and kept[-1] < cache.seen, label


def shown_tokens(ids: torch.Tensor, cache: CompiledCache, cut: int) -> torch.Tensor:
    """Which tokens of the prompt `ids: i64[B, S]` survive the cut after layer `cut`: bool[B, S]."""
    kept, alive = cache.kept[cut], cache.alive[cut]
    width = max(ids.shape[1], int(kept.max()) + 1)
    return torch.zeros(ids.shape[0], width, dtype=torch.bool).scatter(1, kept, alive)[:, : ids.shape[1]]


@contextmanager
def hidden_tokens(
    model: PreTrainedModel, program: Program, shown: dict[int, torch.Tensor], compact: bool
) -> Iterator[None]:
    """The model itself, without cuts: after each cut, attention masks hide the dropped tokens.

    shown: bool[B, S] by cut. compact: tokens of the answer do not see them in the scored layer either.
    """

    def hide(index: int, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length, mask = args[0].shape[1], kwargs["attention_mask"]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if mask is None else mask
        assert mask.dtype == torch.bool
        for cut, prompt in shown.items():
            if index < cut or (index == cut and not compact):
                continue
            seen = torch.nn.functional.pad(prompt, (0, length - prompt.shape[1]), value=True)
            sees_all = ~seen if index > cut else torch.arange(length).expand_as(seen) < prompt.shape[1]
            mask = mask & (seen[:, None, None, :] | sees_all[:, None, :, None])
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            functools.partial(hide, layer.index), with_kwargs=True
        )
        for layer in program.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_honest(model: PreTrainedModel, machine: Machine, inputs: Inputs, label: str) -> None:
    """Every token of the answer is the model's own for prompt and answer so far, with dropped tokens hidden."""
    program, compact = machine.program, machine.program.recipe.tokens.compact_scored_layer
    tokens, logits = answer(machine, inputs)
    assert machine.last is not None
    check_selection(inputs, machine.last, program.plan.cuts, label)
    check_lengths(program, machine.last, "key", label)
    shown = {cut.layer: shown_tokens(inputs["input_ids"], machine.last, cut.layer) for cut in program.plan.cuts}
    for count in range(NEW_TOKENS):
        longer, now = extended(inputs, tokens[:, :count]), (tokens[:, count : count + 1], logits[:, count : count + 1])
        with hidden_tokens(model, program, shown, compact):
            check_same(answer(model, longer, 1), now, f"{label}, token {count}, model")
        if not compact:  # the scored layer's cache is complete: a new pruned prefill sees the same tokens as decode
            check_same(answer(machine, longer, 1), now, f"{label}, token {count}, prefill")


def check_rows_alone(machine: Machine, inputs: Inputs, name: str) -> None:
    """A row of a padded batch has the same answer as the prompt alone."""
    tokens, logits = answer(machine, inputs)
    for row in range(2):
        mine = (tokens[row : row + 1], logits[row : row + 1])
        check_same(answer(machine, row_alone(inputs, row)), mine, f"{name}, row {row} alone")


def check_no_picture(model: PreTrainedModel, machine: Machine, inputs: Inputs, name: str) -> None:
    """Without a picture nothing is cut, and the answer is the model's own."""
    ids = inputs["input_ids"][:, -20:]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_same(answer(machine, text), answer(model, text), f"{name}, no picture")


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_pruned_decode_is_honest(name: str) -> None:
    model, cases, program = captured(name)
    for compact in (False, True):
        recipe = Recipe.load("none").with_overrides([*CUTS, f"tokens.compact_scored_layer={str(compact).lower()}"])
        machine = Machine(compiled(program, recipe))
        for case in ("longer", "padded", "pictures"):
            check_honest(model, machine, with_types(cases, case), f"{name}, {case}, compact {compact}")
    check_rows_alone(machine, cases["padded"], name)
    check_no_picture(model, machine, cases["longer"], name)


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_cuts_before_the_decoder_are_honest(name: str) -> None:
    model, cases, program = captured(name)
    # qapruner reads the text after the picture and may select others on a longer prompt: no new prefill.
    for method, compact in (("divprune", False), ("qapruner", True)):
        changes = [f"tokens.method={method}", "tokens.keep=0.3", f"tokens.compact_scored_layer={str(compact).lower()}"]
        machine = Machine(compiled(program, Recipe.load("none").with_overrides(changes)))
        for case in ("longer", "padded", "pictures"):
            check_honest(model, machine, with_types(cases, case), f"{name}, {method}, {case}")
        check_rows_alone(machine, cases["padded"], f"{name}, {method}")
        check_no_picture(model, machine, cases["longer"], f"{name}, {method}")


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_a_cut_inside_a_layer_is_honest(name: str) -> None:
    model, cases, program = captured(name)
    settings = ("tokens.method=pyramiddrop", "tokens.keep=0.3", "tokens.candidate_layers=[0, 1]")
    machine = Machine(compiled(program, Recipe.load("none").with_overrides(settings)))
    for case in ("longer", "padded"):
        check_honest(model, machine, with_types(cases, case), f"{name}, {case}")


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_tokens_are_counted_anew_where_they_have_numbers(name: str) -> None:
    _, cases, program = captured(name)
    settings = ("tokens.method=sparsevlm", "tokens.keep=0.3", "tokens.candidate_layers=[0, 1]")
    recipe = Recipe.load("none").with_overrides([*settings, "tokens.position_mode=reindex"])
    if name.startswith("qwen"):
        with pytest.raises(PlanError, match="positions have 3 dimensions"):
            compiled(program, recipe)
    else:
        check_rows_alone(Machine(compiled(program, recipe)), cases["padded"], name)


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("name", FAMILIES)
def test_everything_at_once_runs(name: str) -> None:
    _, cases, program = captured(name)
    recipe = Recipe.load("quota-30").with_overrides(["tokens.candidate_layers=[0, 1]", "quantize.transform=hadamard"])
    machine = Machine(compiled(program, recipe, (cases["one"], cases["longer"])))
    for case, inputs in cases.items():
        tokens, logits = answer(machine, inputs)
        cache = machine.last
        assert tokens.shape == (inputs["input_ids"].shape[0], NEW_TOKENS) and logits.isfinite().all(), case
        assert cache is not None and cache.seen == inputs["input_ids"].shape[1] + NEW_TOKENS - 1
        check_lengths(machine.program, cache, "key.codes", f"{name}, {case}")
