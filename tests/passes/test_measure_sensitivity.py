"""Sensitivity of layers to quantization and their attention to the picture, against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import IMAGE
from programs import captured, changed_recipe, fresh

from qpcompile.errors import PlanError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.measure_sensitivity import LayerRows, MeasureSensitivity
from qpcompile.pruning.budget import DEVIATIONS

Apply = Callable[[Program, MeasureSensitivity], bool]
CACHE_ONLY = (
    "quantize.weights.bits=16",
    "quantize.activations.bits=16",
    "quantize.transform=none",
    "quantize.smooth=null",
)


def ready(recipe: str, *settings: str) -> Program:
    """The captured LLaVA with stubs, calibrated without samples."""
    program = fresh(changed_recipe(recipe, *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([], 0)])
    return program


def eager(sample: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states before and after each layer, and attention weights of each layer, by transformers."""
    model, _, _ = captured()
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation("eager")
    hidden: list[torch.Tensor] = []
    language: Any = model.model.language_model
    hooks = [language.layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for layer in language.layers
    ]
    with torch.no_grad():
        result = model(**sample, output_attentions=True)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation(before)
    return hidden, list(result.attentions)


def test_profile_is_that_of_the_model(apply: Apply) -> None:
    _, cases, _ = captured()
    program = ready("prune-30")
    assert not apply(program, MeasureSensitivity([cases["one"]], 1))
    hidden, attentions = eager(cases["one"])
    visual = cases["one"]["input_ids"][0] == IMAGE
    behind = (visual.cumsum(0) > 0) & ~visual
    for facts in program.plan.facts:
        weights = attentions[facts.layer][0].mean(dim=0)[behind].mean(dim=0)
        mass = weights[visual].topk(10).values.sum()
        assert facts.mass_median == pytest.approx(float(mass), abs=1e-5) and facts.mass_iqr == 0
        tokens = torch.nn.functional.normalize(hidden[facts.layer + 1][0][visual], dim=-1)
        pairs = tokens @ tokens.T
        count = tokens.shape[0]
        cosine = (pairs.sum() - count) / (count * (count - 1))
        assert facts.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert program.measured[DEVIATIONS] == {layer: [0.0] for layer in range(3)}


@pytest.mark.parametrize(
    ("of", "source"), [("output", "full_precision"), ("delta", "full_precision"), ("output", "quantized")]
)
def test_deviation_of_one_quantized_part(of: str, source: str) -> None:
    """Only the cache is quantized: transformers' layers with a quantized cache, on their own or a quantized input."""
    model, cases, _ = captured()
    program = ready("quota-30", *CACHE_ONLY, f"tokens.sensitivity_of={of}", f"tokens.sensitivity_input={source}")
    MeasureSensitivity([cases["one"]], 1).run(program)
    hidden, _ = eager(cases["one"])
    language: Any = model.model.language_model
    positions = torch.arange(hidden[0].shape[1])[None]
    original = torch.nn.functional.scaled_dot_product_attention

    def rounded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        key, value = (kv_read(*kv_write(part, 4), part.shape[-1], 4, part.dtype) for part in (key, value))
        return original(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded)
        rotary = language.rotary_emb(hidden[0], positions)
        moved = hidden[0]
        for number, layer in enumerate(language.layers):
            given = moved if source == "quantized" else hidden[number]
            moved = layer(given, position_ids=positions, position_embeddings=rotary)
            moved = moved[0] if isinstance(moved, tuple) else moved
            full = hidden[number + 1] - (hidden[number] if of == "delta" else 0)
            expected = float((moved - hidden[number + 1]).norm() / full.norm())
            assert expected > 1e-3
            assert program.measured[DEVIATIONS][number] == [pytest.approx(expected, rel=1e-3)]


def test_nothing_to_do(apply: Apply) -> None:
    program = ready("none")
    assert not apply(program, MeasureSensitivity([], 0))
    assert program.plan.facts == () and DEVIATIONS not in program.measured


def test_rows_become_medians_and_ranges() -> None:
    facts = LayerRows([], [1.0, 2.0, 3.0, 5.0], [0.1, 0.3, 0.2]).facts(4)
    assert (facts.layer, facts.mass_median, facts.mass_iqr, facts.cosine) == (4, 2.5, 1.75, 0.2)
    assert LayerRows().facts(0).mass_median == 0


def test_a_prompt_without_visual_tokens_is_refused() -> None:
    _, cases, _ = captured()
    text = cases["one"]["input_ids"].clamp(max=IMAGE - 1)
    prompt = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    with pytest.raises(PlanError, match="no sample has visual tokens"):
        MeasureSensitivity([prompt], 1).run(ready("prune-30"))
