"""A compile on the GPU decides what one on the CPU does, up to sums in another order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from second_device import compiled, differences

from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.samples import Samples
from qpcompile.ir.pass_manager import run_passes
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.recipe.recipe import Recipe

TESTBED = Path(__file__).resolve().parents[2] / "testbed"


@pytest.mark.parametrize("preset", ["w4a4kv4", "quota-30"])
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_a_compile_on_the_gpu_has_the_plan_of_one_on_the_cpu(bed: str, preset: str) -> None:
    recipe = Recipe.load(preset).with_overrides(["quantize.transform=hadamard", "calibration.samples=4"])
    model, processor = load_model(TESTBED / bed)
    samples = Samples(TESTBED / "calibration" / bed, processor, 4, recipe.calibration.seed)
    program = capture(model, samples.example(), recipe)
    run_passes(program, [Canonicalize(), InsertQuantStubs()])
    here, _ = compiled(program, samples, None)
    there, work = compiled(program, samples, torch.device("cuda", 0))
    found = differences(here, there)
    assert set(work.done) == {"cuda"}
    assert found["same_plan"]
    assert found["codes"] < 0.02 and found["numbers"] < 1e-3 and found["ratios"] < 1e-3
    assert found["site_errors"] < 0.02 and found["sensitivity"] < 1e-3
