"""Both models are asked the same, in turns; what they say is on the page, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qpcompile.capture.data_folder import Question
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import CalibrationError, InputError
from qpcompile.inspect.side_by_side import Measured, SideBySide, side_by_side
from tests.families import llava

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two questions, one of them hostile."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": text, "answer": text} for text in ("what?", HOSTILE)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return tmp_path


def test_different_answers_come_first() -> None:
    questions = tuple(Question(Path("a.png"), text, "right") for text in "abc")
    ours, theirs = (Measured(answers, 0, 1.0, 1.0, 1, 1) for answers in (("x", "y", "z"), ("x", "other", "z")))
    found = SideBySide(questions, ours, theirs, 1)
    assert [row.question for row in found.rows] == ["b", "a", "c"] and found.equal_answers == 2
    alone = SideBySide(questions, ours, None, 1)
    assert [row.original for row in alone.rows] == [None] * 3 and not any(row.differs for row in alone.rows)


def test_page_shows_both_models_and_escapes_what_they_say(compiled: CompiledVLM, folder: Path) -> None:
    model, _ = llava()
    compiled.report(folder / "report.html", data=folder, original=model)
    page = (folder / "report.html").read_text("utf-8")
    answers = page.partition('id="answers"')[2].partition("<h2")[0]
    costs = page.partition('id="costs"')[2].partition("<h2")[0]
    assert HOSTILE not in page and "&lt;img src=x onerror=alert(1)&gt;" in answers
    assert "of 2 questions" in answers and "&lt;" in answers.partition("<tbody>")[2]
    names = ("time to the first token", "time per later token", "weights in memory", "largest KV cache")
    assert all(name in costs for name in names) and costs.count('<td class="n">') == 12
    assert "Medians over 2 answers of 24 tokens each, one by one, of both models in turns" in costs


def test_the_compiled_model_alone(compiled: CompiledVLM, folder: Path) -> None:
    compiled.report(folder / "report.html", data=folder, limit=1)
    page = (folder / "report.html").read_text("utf-8")
    assert "The original was not asked; 0 of 1 answers are right" in page
    costs = page.partition('id="costs"')[2].partition("<h2")[0]
    assert costs.count('<td class="n">') == 4 and "original" not in costs


def test_answers_and_bytes_are_those_of_the_models(compiled: CompiledVLM, folder: Path) -> None:
    model, _ = llava()
    (question,) = [Question(folder / "a.png", "what?", "?")]
    found = side_by_side(compiled.machine, model, compiled.processor, [question])
    assert found.original is not None and found.original.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert found.compiled.weight_bytes == compiled.weight_bytes() < found.original.weight_bytes
    assert 0 < found.compiled.cache_bytes < found.original.cache_bytes
    assert found.compiled.first_ms > 0 and found.compiled.token_ms > 0
    assert found.compiled.answers[0] and len(found.compiled.answers) == 1


def test_refusals(compiled: CompiledVLM, folder: Path) -> None:
    with pytest.raises(InputError, match="no questions to ask the original"):
        compiled.report(folder / "report.html", original=object())
    with pytest.raises(CalibrationError, match="no question to ask"):
        compiled.report(folder / "report.html", data=folder, limit=0)
    with pytest.raises(CalibrationError, match="need a processor"):
        side_by_side(compiled.machine, None, None, [Question(folder / "a.png", "what?", "?")])
    assert not (folder / "report.html").exists()
