"""Every preset on both testbeds, end to end, with the installed versions; `make test-newest` runs it too.

python -m pytest -m slow tests/test_presets.py        about twenty minutes on one core
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_operators import LAYER, PLAIN_PROMPT, PROMPT, STEP, operators

import qpcompile
from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.capture.load import load_model
from qpcompile.ir.program import DECODE, PREFILL
from qpcompile.recipe.recipe import Recipe, preset_names

BEDS = Path(__file__).resolve().parent / "testbed"
# Little calibration and training: this tests whether it works; test_testbed_accuracy.py tests how well.
BRIEF = ("calibration.samples=2",)
BRIEF_TRAINING = ("quantize.training.samples=2", "quantize.training.epochs=1")
NEW = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@functools.cache
def questions(bed: str) -> dict[str, Any]:
    """Two of a testbed's questions as one batch."""
    _, processor = load_model(BEDS / bed)
    return question_inputs(processor, read_questions(BEDS / "calibration" / bed)[-2:])


def answer(model: Any, bed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy answer: ids i64[2, S + new], and logits f32[2, new, V]."""
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**questions(bed), **options)
    return result.sequences, torch.stack(result.logits, dim=1)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_compile_answer_save_load_and_answer_again(tmp_path: Path, bed: str, preset: str) -> None:
    """`compile` itself ends with the check that decode agrees with recomputation on the kept tokens."""
    recipe = Recipe.load(preset).with_overrides(BRIEF)
    if recipe.quantize is not None:
        recipe = recipe.with_overrides(BRIEF_TRAINING)
    model, processor = load_model(BEDS / bed)
    expected = answer(model, bed)
    compiled = qpcompile.compile(model, recipe, processor=processor, calibration=BEDS / "calibration" / bed)
    found = answer(compiled, bed)
    if recipe.quantize is not None and recipe.quantize.activations.bits != 16:
        prompt = PLAIN_PROMPT if recipe.quantize.transform == "none" else PROMPT
        assert operators(compiled.program.graphs[PREFILL]) == LAYER + prompt
        assert operators(compiled.program.graphs[DECODE]) == LAYER + STEP
        assert compiled.decode_problem == ""
    compiled.save_pretrained(tmp_path / "out")
    again = answer(qpcompile.load(tmp_path / "out"), bed)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])
    assert found[1].isfinite().all()
    # Full precision must give equal tokens; with 4 bits or pruned tokens the first logits must differ.
    changed = (found[1][:, 0] - expected[1][:, 0]).abs().max()
    if recipe.quantize is None and recipe.tokens.method == "none":
        assert torch.equal(found[0], expected[0]) and changed < 1e-4
    else:
        assert changed > 1e-3
