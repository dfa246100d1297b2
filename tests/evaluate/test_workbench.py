"""Sharing changes nothing: a compile on the workbench equals a separate compile, whatever was compiled before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.artifact.weights import stored_tensors
from qpcompile.errors import CalibrationError
from qpcompile.evaluate.run import workbench
from qpcompile.evaluate.run.workbench import SENSITIVITY_KEYS, Workbench
from qpcompile.recipe.recipe import Recipe, preset_names
from qpcompile.recipe.tokens import TokenScheme

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
FEW = ["calibration.samples=2"]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    made = Workbench(str(TESTBED / "llava"), TESTBED / "calibration" / "llava")
    # Others come first, so that every compile below finds measurements to share, or to ignore.
    for name in ("w4a4kv4", "quota-30", "prune-30"):
        made.compile(Recipe.load(name).with_overrides(FEW))
    return made


def assert_same(one: CompiledVLM, other: CompiledVLM) -> None:
    assert one.plan == other.plan
    tensors, others = stored_tensors(one.program).tensors, stored_tensors(other.program).tensors
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert all(one.graph_text(name) == other.graph_text(name) for name in one.program.graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_compiles_as_it_does_alone(bench: Workbench, name: str) -> None:
    recipe = Recipe.load(name).with_overrides(FEW)
    alone = qpcompile.compile(bench.model, recipe, processor=bench.processor, calibration=bench.calibration)
    assert_same(bench.compile(recipe), alone)


@pytest.mark.slow
def test_another_seed_is_measured_anew_on_the_same_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    monkeypatch.setattr(workbench, "capture", lambda *given: captures.append(given) or capture(*given))
    bench = Workbench(str(TESTBED / "llava"), TESTBED / "calibration" / "llava")
    recipe = Recipe.load("w4a4kv4").with_overrides([*FEW, "quantize.transform=hadamard"])
    other = recipe.with_overrides(["calibration.seed=1"])
    first, second = bench.compile(recipe), bench.compile(other)
    bench.captured(Recipe())
    assert len(captures) == 1
    assert first.plan.calibration.sha256 != second.plan.calibration.sha256
    assert [site.error for site in first.plan.sites] != [site.error for site in second.plan.sites]
    alone = qpcompile.compile(bench.model, other, processor=bench.processor, calibration=bench.calibration)
    assert_same(second, alone)


def test_keys_that_are_decided_later_exist() -> None:
    assert set(SENSITIVITY_KEYS) <= set(TokenScheme.model_fields)


@pytest.mark.slow
def test_samples_that_are_needed_are_asked_for() -> None:
    bench = Workbench(str(TESTBED / "llava"), None)
    with pytest.raises(CalibrationError, match="gptq"):
        bench.compile(Recipe.load("w4a4kv4"))
