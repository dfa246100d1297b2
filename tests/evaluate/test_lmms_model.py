"""lmms-eval itself runs a local task through the adapter and finds the accuracy that `qpcompile eval` finds.

Needs `pip install lmms-eval` beside this package, which CI does not have: skipped with a reason then.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTBED = HERE.parent / "testbed"
DATA = TESTBED / "calibration" / "llava"
QUESTIONS = 12

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with the task, over questions with absolute picture paths."""
    lines = [json.loads(line) for line in (DATA / "data.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**line, "image": str(DATA / line["image"])}) + "\n" for line in lines))
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "testbed_task.py").write_bytes((HERE / "lmms_task" / "testbed_task.py").read_bytes())
    text = (HERE / "lmms_task" / "testbed.yaml").read_text(encoding="utf-8")
    (folder / "testbed.yaml").write_text(text.replace("QPCOMPILE_DATA", str(data)))
    return folder


def run_lmms_eval(task: Path, out: Path, arguments: str, batch: int) -> float:
    """The accuracy that the program lmms-eval writes down."""
    words = ["eval", "--model", "qpcompile", "--model_args", arguments, "--tasks", "qpcompile_testbed"]
    words += ["--include_path", str(task), "--batch_size", str(batch), "--output_path", str(out), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "lmms_eval", *words], check=True, timeout=600)
    (found,) = out.rglob("*results.json")
    (metrics,) = json.loads(found.read_text())["results"].values()
    return next(value for name, value in metrics.items() if name.startswith("exact,"))


def test_the_entry_point_is_there() -> None:
    assert [point.name for point in entry_points(group="lmms_eval.models")].count("qpcompile") == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "w4a4kv4"])
def test_lmms_eval_finds_our_accuracy(task: Path, tmp_path: Path, recipe: str | None) -> None:
    from qpcompile.evaluate.data_sets import read_data
    from qpcompile.evaluate.evaluation import Exam
    from qpcompile.evaluate.examiner import Examiner
    from qpcompile.recipe import Recipe

    model = str(TESTBED / "llava")
    arguments = f"pretrained={model}" + (f",recipe={recipe},calibration={DATA}" if recipe else "")
    found = run_lmms_eval(task, tmp_path / "out", arguments, 4)
    exam = Exam(str(DATA), read_data(DATA)[:QUESTIONS], "choice", 4, 4)
    row = Examiner(model, exam, DATA).row("row", Recipe.load(recipe) if recipe else None)
    assert found == pytest.approx(row.accuracy)
