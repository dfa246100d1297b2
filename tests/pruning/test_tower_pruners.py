"""VisionZip and PruMerge+: the tower's scores, the kept tokens and the merging, against transformers and numpy.

The tower's attention is taken from transformers' own eager attention; selection, merging and decoding are recomputed
one prompt at a time, on the shortened sequence with the original positions.
"""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import expecttest
import numpy as np
import pytest
import torch
from families import IMAGE, Cases, Inputs, qwen2_5_vl
from programs import HERE, captured, changed_recipe
from torch import nn
from transformers import PreTrainedModel
from transformers.models.clip import modeling_clip
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.vision_utils import get_vision_window_index

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import PlanError, RecipeError
from qpcompile.ir.edit import aten, clone
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, VISION, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.kernels.attention_received.reference import attention_received
from qpcompile.pass_list import passes
from qpcompile.pruning.pruner import INPUT
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES, Machine

Array = np.ndarray[Any, Any]
METHODS = {"visionzip": 10 / 64, "prumerge_plus": 3 / 4}
FAMILIES = ("llava", "qwen2_5_vl")
KEEP, NEIGHBOURS, NEW = 0.4, 32, 3
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def traced_qwen() -> tuple[PreTrainedModel, Cases, Program]:
    model, cases = qwen2_5_vl()
    return model, cases, capture(model, cases["one"], Recipe.load("none"))


def family(name: str) -> tuple[PreTrainedModel, Cases, Program]:
    return captured() if name == "llava" else traced_qwen()


@functools.cache
def compiled(name: str, method: str, *settings: str) -> CompiledVLM:
    """A tiny model pruned by one method, not quantized unless `settings` ask for it."""
    recipe = changed_recipe("none", f"tokens.method={method}", f"tokens.keep={KEEP}", *settings)
    _, _, whole = family(name)
    layers = whole.layers
    graphs = {name: clone(graph) for name, graph in whole.graphs.items()}
    program = Program(graphs, copy.deepcopy(whole.host), whole.layers, recipe, Plan(recipe=recipe, layers=layers))
    run_passes(program, passes((), 0))
    return CompiledVLM(program)


def attention_of_tower(name: str, inputs: Inputs) -> tuple[Array, Array, Array]:
    """Of the layer whose output is used: f[pictures or 1, H, T, T] attention and f[.., H, T, D] queries and keys."""
    model, _, _ = family(name)
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    code = modeling_clip if name == "llava" else modeling_qwen2_5_vl
    original = code.eager_attention_forward
    calls: list[tuple[int, list[torch.Tensor]]] = []
    tower: Any = model.get_submodule("model.vision_tower" if name == "llava" else "model.visual")
    modules = [layer.self_attn for layer in tower.encoder.layers] if name == "llava" else [b.attn for b in tower.blocks]

    def record(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, *args, **kwargs)
        if module in modules:
            calls.append((modules.index(module), [weights, query, key]))
        return output, weights

    pictures = {key: value for key, value in inputs.items() if key in ("pixel_values", "image_grid_thw")}
    with torch.no_grad(), mock.patch.object(code, "eager_attention_forward", record):
        model.get_image_features(**pictures)  # type: ignore[operator]
    # LLaVA uses the output of the second-to-last layer; Qwen attends in one call per segment, of equal lengths or not.
    layer = len(modules) - (2 if name == "llava" else 1)
    used = [tensors for index, tensors in calls if index == layer]
    total = sum(weights.shape[-1] for weights, _, _ in used)
    weights = torch.zeros(*used[0][0].shape[:2], total, total)
    start = 0
    for part, _, _ in used:
        end = start + part.shape[-1]
        weights[..., start:end, start:end] = part
        start = end
    query, key = (torch.cat([tensors[index] for tensors in used], dim=2) for index in (1, 2))
    return weights.double().numpy(), query.double().numpy(), key.double().numpy()


def softmax(scores: Array) -> Array:
    parts = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return parts / parts.sum(axis=-1, keepdims=True)


def said_by_tower(name: str, method: str, inputs: Inputs) -> tuple[Array, Array]:
    """Score and key of every visual token, f[N] and f[N, K], from transformers' own attention."""
    weights, query, key = attention_of_tower(name, inputs)
    if method == "prumerge_plus":
        sees = weights.sum(axis=1, keepdims=True) > 0
        query, key = (np.concatenate(list(each.transpose(1, 0, 2, 3)), axis=-1)[:, None] for each in (query, key))
        scores = query @ key.transpose(0, 1, 3, 2) * query.shape[-1] ** -0.5
        weights = softmax(np.where(sees, scores, -np.inf))
    attention, keys = weights.mean(axis=1), key.mean(axis=1)
    if name == "llava":
        return attention[:, 0, 1:].reshape(-1), keys[:, 1:].reshape(-1, keys.shape[-1])
    merge, config = 4, family(name)[0].config.vision_config
    order, _ = get_vision_window_index(
        inputs["image_grid_thw"], config.spatial_merge_size, config.window_size, config.patch_size
    )
    back = np.argsort(order.numpy())
    received = attention[0].sum(axis=0).reshape(-1, merge).mean(axis=1)
    return received[back], keys[0].reshape(-1, merge, keys.shape[-1]).mean(axis=1)[back]


def row_alone(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch with one picture per row, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    alone |= {key: alone[key][:, real] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in alone}
    if "image_grid_thw" in inputs:
        alone["pixel_values"] = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=1).tolist())[row]
    return alone


def chosen(scores: Array, share: float) -> tuple[list[int], list[int]]:
    """The best and the spaced tokens of one prompt, by their number among its visual tokens."""
    keep = -(-len(scores) * 4 // 10)
    spaced = int(np.floor(keep * share + 0.5))
    best = np.argsort(-scores, kind="stable")[: keep - spaced].tolist()
    rest = [i for i in range(len(scores)) if i not in best]
    return best, [rest[step * len(rest) // spaced] for step in range(spaced)]


def merged(method: str, hidden: Array, scores: Array, keys: Array, best: list[int], spaced: list[int]) -> Array:
    """The visual tokens of one prompt, f[V, C], after merging into the kept ones."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    alike, result = unit @ unit.T, hidden.copy()
    if method == "visionzip":
        dropped = [i for i in range(len(hidden)) if i not in best + spaced]
        for target in spaced:
            joined = [i for i in dropped if spaced[int(np.argmax(alike[i, spaced]))] == target]
            result[target] += hidden[joined].mean(axis=0) if joined else 0
        return result
    for target in best + spaced:
        others = sorted((i for i in range(len(hidden)) if i != target), key=lambda i: -alike[target, i])[:NEIGHBOURS]
        result[target] += sum(scores[i] / scores.sum() * hidden[i] for i in others)
    return result


def shortened(name: str, method: str, inputs: Inputs) -> tuple[list[int], torch.Tensor]:
    """Kept positions of one prompt, and logits f[NEW, V] of its greedy answer, by the model itself."""
    model, _, _ = family(name)
    language: Any = model.get_submodule("model.language_model")
    seen: list[dict[str, Any]] = []
    handle = language.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    embeds, positions = seen[0]["inputs_embeds"].clone(), seen[0]["position_ids"]
    scores, keys = said_by_tower(name, method, inputs)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    best, spaced = chosen(scores, METHODS[method])
    hidden = merged(method, embeds[0, visual].double().numpy(), scores, keys, best, spaced)
    embeds[0, visual] = torch.from_numpy(hidden).to(embeds)
    drop = set(visual.tolist()) - {int(visual[i]) for i in best + spaced}
    kept = [i for i in range(embeds.shape[1]) if i not in drop]
    embeds, logits = embeds[:, kept], []
    if positions is None:
        positions = torch.arange(inputs["input_ids"].shape[1])[None]
    positions = positions[..., kept]
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        for _ in range(NEW):
            # Without a mask transformers treats gaps in the positions as borders of packed sequences.
            everything = torch.ones(embeds.shape[:2], dtype=torch.long)
            found = language(inputs_embeds=embeds, position_ids=positions, attention_mask=everything, use_cache=False)
            logits.append(head(found.last_hidden_state[:, -1]))
            token = logits[-1].argmax(-1, keepdim=True)
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)], dim=1)
            positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return kept, torch.cat(logits)


def rows_of(inputs: Inputs) -> list[Inputs]:
    count = inputs["input_ids"].shape[0]
    return [inputs] if count == 1 else [row_alone(inputs, row) for row in range(count)]


# The default suite has each method and each family once.
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava", "prumerge_plus"),
        ("qwen2_5_vl", "visionzip"),
        pytest.param("llava", "visionzip", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", "prumerge_plus", marks=pytest.mark.slow),
    ],
)
def test_the_tower_says_what_its_attention_gives(name: str, method: str) -> None:
    _, cases, _ = family(name)
    seen: list[dict[str, torch.Tensor]] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = graph(feeds)
        if graph.name == VISION:
            seen.append({path: results[path] for path in (VISUAL_SCORES, VISUAL_KEYS)})
        return results

    with torch.no_grad():
        Machine(compiled(name, method).program, execute).prefill(cases["pictures"])
    scores, keys = said_by_tower(name, method, cases["pictures"])
    np.testing.assert_allclose(seen[0][VISUAL_SCORES].numpy(), scores, **CLOSE)
    np.testing.assert_allclose(seen[0][VISUAL_KEYS].numpy(), keys, **CLOSE)


@pytest.mark.parametrize("case", ["longer", "padded", "pictures"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_keeps_merges_and_decodes_as_the_formulas_say(name: str, method: str, case: str) -> None:
    _, cases, _ = family(name)
    model = compiled(name, method)
    kept = model.kept_tokens(**cases[case])[INPUT]
    result = model.generate(
        **cases[case], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(result.logits, dim=1)
    for row, inputs in enumerate(rows_of(cases[case])):
        positions, expected = shortened(name, method, inputs)
        padding = cases[case]["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        assert [i - padding for i in kept[row].tolist() if i >= 0] == positions
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_names_the_operators_that_it_adds(method: str) -> None:
    graphs = compiled("llava", method).program.graphs.values()
    scoring = {operator for pruner in PRUNERS.values() for operator in pruner.operators}
    assert {node.target for graph in graphs for node in graph.nodes} & scoring == set(PRUNERS[method].operators)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_without_a_picture_is_the_models(name: str, method: str) -> None:
    model, cases, _ = family(name)
    ids = cases["longer"]["input_ids"][:, -15:]
    text: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in cases["longer"]:
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    expected: Any = model.generate(**text, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert compiled(name, method).generate(**text, max_new_tokens=NEW, do_sample=False).tolist() == expected.tolist()


def test_all_patches_may_be_asked_where_there_is_a_class_token() -> None:
    _, cases, _ = family("llava")
    inputs = cases["longer"]
    weights, _, _ = attention_of_tower("llava", inputs)
    best, spaced = chosen(weights.mean(axis=1)[0].sum(axis=0)[1:], 10 / 64)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    kept = compiled("llava", "visionzip", "tokens.tower_queries=all").kept_tokens(**inputs)[INPUT][0]
    assert set(kept.tolist()) & set(range(first, first + 16)) == {first + i for i in best + spaced}


def test_spread_share_is_the_recipes() -> None:
    _, cases, _ = family("llava")
    model = compiled("llava", "visionzip", "tokens.spread_share=1.0")
    first = int((cases["one"]["input_ids"][0] == IMAGE).nonzero()[0])
    found = [i - first for i in model.kept_tokens(**cases["one"])[INPUT][0].tolist() if 0 <= i - first < 16]
    assert found == [step * 16 // 7 for step in range(7)]


def test_a_quantized_tower_scores_with_its_own_attention() -> None:
    _, cases, _ = family("llava")
    quantized = compiled(
        "llava",
        "visionzip",
        "quantize={weights: {solver: rtn}, scope: [vision]}",
    )
    vision = quantized.program.graphs[VISION]
    attention = [node for node in vision.nodes if node.target is aten.scaled_dot_product_attention.default]
    assert any(node.target is LINEAR_INT for node in vision.nodes)
    read: list[tuple[Any, ...]] = []

    def look(node: Any, args: tuple[Any, ...], value: Any) -> Any:
        if node is attention[0]:
            read.append(args)
        return value

    results = run_watched(vision, {"pixel_values": cases["one"]["pixel_values"]}, look, HERE)
    query, key, *_ = read[0]
    expected = attention_received(query, key, None, query.shape[-1] ** -0.5, True)[:, 1:].float()
    torch.testing.assert_close(results[VISUAL_SCORES], expected.reshape(-1), **CLOSE)
    torch.testing.assert_close(results[VISUAL_KEYS], key.mean(1)[:, 1:].flatten(0, 1).float(), **CLOSE)
    scores, _ = said_by_tower("llava", "visionzip", cases["one"])
    assert np.abs(results[VISUAL_SCORES].numpy() - scores).max() > 1e-4


def test_golden_side_outputs_of_packed_patches() -> None:
    program = compiled("qwen2_5_vl", "prumerge_plus").program
    lines = graph_text(program.graphs[VISION]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "attention_received" in line)
    expecttest.assert_expected_inline(
        "".join(lines[start:]),
        """\
%114 = qpcompile::attention_received(%103, %106, %2, 0.1767766952966369, False) : f32[1, S6*((S0//((S0//4))))]
%115 = aten::mean.dim(%106, [1]) : f32[1, S6*((S0//((S0//4)))), 32]
%116 = aten::reshape(%114, [-1]) : f32[S6*((S0//((S0//4))))]
%117 = aten::index.Tensor(%116, [%113]) : f32[S6, ((S6*((S0//((S0//4)))))//(((S6*((S0//((S0//4)))))//4)))]
%118 = aten::mean.dim(%117, [1]) : f32[S6]
%119 = aten::reshape(%118, [-1]) : f32[S6]
%120 = aten::reshape(%115, [-1, 32]) : f32[S6*((S0//((S0//4)))), 32]
%121 = aten::index.Tensor(%120, [%113]) : f32[S6, ((S6*((S0//((S0//4)))))//(((S6*((S0//((S0//4)))))//4))), 32]
%122 = aten::mean.dim(%121, [1]) : f32[S6, 32]
%123 = aten::reshape(%122, [-1, 32]) : f32[S6, 32]
return pooler_output = %100
return visual_scores = %119
return visual_keys = %123
""",
    )
    lines = graph_text(program.graphs[PREFILL]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "spread_tokens" in line)
    expecttest.assert_expected_inline(
        "".join(lines[start : start + 10]),
        """\
%59 = qpcompile::spread_tokens(%3, %54, %58, 0.75) : f32[B, S0]
%60 = aten::where.ScalarOther(%5, %59, inf) : f32[B, S0]
%61 = aten::where.ScalarOther(%6, %60, -inf) : f32[B, S0]
%62 = aten::gt.Scalar(%61, 0.0) : bool[B, S0]
%63 = aten::bitwise_and.Tensor(%54, %62) : bool[B, S0]
%64 = aten::where.ScalarOther(%54, %3, 0.0) : f32[B, S0]
%65 = aten::sum.dim_IntList(%64, [1], True) : f32[B, 1]
%66 = aten::clamp_min(%65, 1e-12) : f32[B, 1]
%67 = aten::div.Tensor(%64, %66) : f32[B, S0]
%68 = qpcompile::merge_tokens(%2, %4, %67, %63, %54, 32) : f32[B, S0, 48]
""",
    )


def test_refuses_a_tower_that_scores_another_number_of_tokens() -> None:
    _, cases, _ = family("llava")

    def twice(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = graph(feeds)
        return results | {path: torch.cat([results[path]] * 2) for path in (VISUAL_SCORES,) if path in results}

    with torch.no_grad(), pytest.raises(PlanError, match="scored 32 tokens, the prompt has 16"):
        Machine(compiled("llava", "visionzip").program, twice).prefill(cases["one"])


def test_refuses_shares_that_are_none() -> None:
    with pytest.raises(RecipeError, match=r"tokens\.spread_share"):
        changed_recipe("none", "tokens.method=visionzip", "tokens.spread_share=1.2")
