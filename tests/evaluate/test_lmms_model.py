"""lmms-eval itself runs a local task through the adapter and reports the accuracy of `qpcompile eval`.

Needs `pip install lmms-eval` in the environment, which CI does not have: skipped with a reason there. What the adapter
passes to the processor is tested without it, with stand-ins for the four names that it imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.errors import CalibrationError

HERE = Path(__file__).resolve().parent
TESTBED = HERE.parent / "testbed"
DATA = TESTBED / "calibration" / "llava"
QUESTIONS = 12

installed = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


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
    """The accuracy that the program lmms-eval reports."""
    words = ["eval", "--model", "qpcompile", "--model_args", arguments, "--tasks", "qpcompile_testbed"]
    words += ["--include_path", str(task), "--batch_size", str(batch), "--output_path", str(out), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "lmms_eval", *words], check=True, timeout=600)
    (found,) = out.rglob("*results.json")
    (metrics,) = json.loads(found.read_text())["results"].values()
    return next(value for name, value in metrics.items() if name.startswith("exact,"))


class Messages:
    """lmms-eval's messages as far as the adapter reads them."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
        parts = [part for message in self.messages for part in message["content"]]
        pictures, videos, sounds = ([p for p in parts if p["type"] == kind] for kind in ("image", "video", "audio"))
        return pictures, videos, sounds

    def to_hf_messages(self) -> list[dict[str, Any]]:
        return self.messages


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter's module, over stand-ins for lmms-eval."""
    for name, value in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": object},
        "lmms_eval.api.model": {"lmms": object},
        "lmms_eval.protocol": {"ChatMessages": Messages},
    }.items():
        monkeypatch.setitem(sys.modules, name, cast(ModuleType, SimpleNamespace(**value)))
    monkeypatch.delitem(sys.modules, "qpcompile.evaluate.run.lmms_model", raising=False)
    yield import_module("qpcompile.evaluate.run.lmms_model")
    sys.modules.pop("qpcompile.evaluate.run.lmms_model", None)


def answered(adapter: Any, docs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The model inputs of requests with these message contents, asked in one batch."""
    asked: dict[str, Any] = {}

    def generate(**inputs: Any) -> torch.Tensor:
        asked.update(inputs)
        return inputs["input_ids"]

    model = object.__new__(adapter.LmmsModel)
    model.batch_size, model.processor = len(docs), AutoProcessor.from_pretrained(TESTBED / "llava")
    model.model = SimpleNamespace(generate=generate, device=torch.device("cpu"))
    model.task_dict = {"task": {"test": docs}}
    requests = [
        SimpleNamespace(args=("", lambda doc: [{"role": "user", "content": doc}], {}, number, "task", "test"))
        for number in range(len(docs))
    ]
    assert model.generate_until(requests) == [""] * len(docs)
    return asked


def test_the_adapter_asks_as_eval_does(adapter: Any) -> None:
    questions = read_questions(DATA)[:3]
    docs = [
        [{"type": "image", "image": Image.open(question.picture)}, {"type": "text", "text": question.question}]
        for question in questions
    ]
    ours, theirs = question_inputs(AutoProcessor.from_pretrained(TESTBED / "llava"), questions), answered(adapter, docs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "text", "text": "<image>"}, "the text holds '<image>'"),
        ({"type": "video", "video": "a.mp4"}, "only pictures can be shown"),
        ({"type": "image", "image": "absent.png"}, "absent.png is missing"),
    ],
)
def test_what_the_adapter_cannot_ask_names_the_document(adapter: Any, part: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words) as error:
        answered(adapter, [[{"type": "text", "text": "what?"}], [part]])
    assert error.value.where == "task task, test, 1"


@installed
def test_the_entry_point_is_there() -> None:
    assert [point.name for point in entry_points(group="lmms_eval.models")].count("qpcompile") == 1


@installed
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "w4a4kv4"])
def test_lmms_eval_finds_our_accuracy(task: Path, tmp_path: Path, recipe: str | None) -> None:
    from qpcompile.evaluate.questions.data_sets import read_data
    from qpcompile.evaluate.run.evaluation import Exam
    from qpcompile.evaluate.run.examiner import Examiner
    from qpcompile.recipe.recipe import Recipe

    model = str(TESTBED / "llava")
    arguments = f"pretrained={model}" + (f",recipe={recipe},calibration={DATA}" if recipe else "")
    found = run_lmms_eval(task, tmp_path / "out", arguments, 4)
    exam = Exam(str(DATA), read_data(DATA)[:QUESTIONS], "choice", 4, 4)
    row = Examiner(model, exam, DATA).compute("row", Recipe.load(recipe) if recipe else None)
    assert found == pytest.approx(row.accuracy)
