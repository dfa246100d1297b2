"""The accuracy of presets relative to full precision on the trained testbeds: 1,000 unseen questions each.

python -m pytest -m slow tests/test_testbed_accuracy.py        about half an hour on two cores
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qpcompile
from qpcompile.capture.data_folder import Question, read_questions
from qpcompile.capture.load import load_model
from qpcompile.evaluate.run.accuracy import accuracy

TESTBED = Path(__file__).parent / "testbed"
SEED, QUESTIONS = 7, 1000
PLAIN = (
    "quantize.weights.solver=rtn",
    "quantize.transform=none",
    "quantize.smooth=null",
    "quantize.center=null",
    "quantize.activations.clip_search=false",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@functools.cache
def unseen(family: str, folder: Path) -> list[Question]:
    """Questions from a seed that is neither training's nor calibration's."""
    target = folder / family
    options = ["--family", family, "--count", str(QUESTIONS), "--seed", str(SEED), "--out", str(target)]
    subprocess.run([sys.executable, str(TESTBED / "scenes.py"), *options], check=True)
    return read_questions(target)


@functools.cache
def loaded(bed: str) -> tuple[Any, Any]:
    """Model and processor."""
    return load_model(TESTBED / bed)


@functools.cache
def score(bed: str, folder: Path, recipe: str | None, *overrides: str) -> float:
    """Accuracy of a recipe on a testbed; None is full precision."""
    model, processor = loaded(bed)
    family = bed.removesuffix("-outliers")
    generate = model.generate
    if recipe is not None:
        asked = qpcompile.Recipe.load(recipe).with_overrides(list(overrides))
        calibration = TESTBED / "calibration" / family
        generate = qpcompile.compile(model, asked, processor=processor, calibration=calibration).generate
    questions = unseen(family, folder)
    return accuracy(generate, processor, questions, 16, max_new_tokens=4, name=f"{bed} {recipe}").accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all questions."""
    return tmp_path_factory.mktemp("unseen")


@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("recipe", "share"), [("w4a4kv4", 0.95), ("quota-30", 0.92)])
def test_presets_keep_most_of_full_precision(bed: str, recipe: str, share: float, folder: Path) -> None:
    assert score(bed, folder, recipe) >= share * score(bed, folder, None)


@pytest.mark.parametrize("bed", ["llava-outliers", "qwen2_5_vl-outliers"])
def test_outliers_break_plain_rounding_and_not_the_default(bed: str, folder: Path) -> None:
    full = score(bed, folder, None)
    assert score(bed, folder, "w4a4kv4", *PLAIN) <= full - 0.10
    assert score(bed, folder, "w4a4kv4") >= 0.93 * full
