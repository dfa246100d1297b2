"""A bfloat16 model end to end: 4-bit operators take its activations, answers have its dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import llava

import qpcompile


@pytest.mark.families
@pytest.mark.parametrize(
    "settings", [["quantize.transform=hadamard"], pytest.param([], marks=pytest.mark.slow, id="trained")]
)
def test_bfloat16_is_compiled_saved_and_answers(settings: list[str], tmp_path: Path) -> None:
    model, cases = llava()
    model = model.bfloat16()
    cases = {
        name: {key: value.bfloat16() if value.is_floating_point() else value for key, value in case.items()}
        for name, case in cases.items()
    }
    recipe = qpcompile.Recipe.load("w4a4kv4").with_overrides(settings)
    compiled = qpcompile.compile(model, recipe, calibration=[cases["one"], cases["longer"]])
    assert compiled.dtype == torch.bfloat16
    assert {site.kernel for site in compiled.plan.sites if site.weight_bits == 4} == {"qpcompile::linear_int"}
    compiled.save_pretrained(tmp_path / "out")
    again = qpcompile.load(tmp_path / "out")
    for case in cases.values():
        answer = compiled.generate(
            **case, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert answer.logits[0].isfinite().all()
        assert again.generate(**case, max_new_tokens=4, do_sample=False).tolist() == answer.sequences.tolist()
