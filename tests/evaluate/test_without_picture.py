"""Questions with and without a picture in one data set: answers, sizes, scores by group; models that need a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

from qpcompile.capture.data_folder import Question, question_inputs
from qpcompile.capture.load import load_model
from qpcompile.cli.evaluate import recipe_rows
from qpcompile.cli.main import app
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import CalibrationError, InputError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.questions.scienceqa import COLUMNS
from qpcompile.evaluate.run import examiner as examiner_module
from qpcompile.evaluate.run.evaluation import Exam, Subject, ask, check_without_picture, evaluate, group_scores
from qpcompile.evaluate.run.examiner import Examiner, artifact_row
from qpcompile.evaluate.run.rows import GroupScore, Row, RowFolder, Scoring
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.recipe.recipe import Recipe

CALIBRATION = Path(__file__).resolve().parents[1] / "testbed" / "calibration" / "llava"
FAST = ["calibration.samples=1", "quantize.weights.solver=rtn", "quantize.transform=hadamard"]
VISUAL = 144
# subject, grade, hint, picture, number of choices
PROBLEMS = [
    ("natural science", 2, "look at the star .", True, 3),
    ("social science", 7, "", False, 2),
    ("language science", 6, "the heart is red .", False, 3),
    ("natural science", 12, "", True, 2),
    ("social science", 1, "", True, 3),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five PROBLEMS, all of the split test."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = {}
    for number, (subject, grade, hint, shown, choices) in enumerate(PROBLEMS):
        if shown:
            place = folder / "images" / "test" / str(number)
            place.mkdir(parents=True)
            (place / "image.png").write_bytes((CALIBRATION / f"0000{number}.png").read_bytes())
        problems[str(number)] = {
            "question": f"which is {['red', 'blue', 'green', 'white', 'cyan'][number]} ?",
            "choices": ["the star", "the heart", "the cross"][:choices],
            "answer": number % choices,
            "hint": hint,
            "image": "image.png" if shown else None,
            "subject": subject,
            "grade": f"grade{grade}",
        }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA whose words include the letters of choices."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {"b": 64, "c": 65}
    path.write_text(json.dumps(tokenizer))
    return folder


def exam(data: Path, scoring: Scoring = "choice", batch: int = 2) -> Exam:
    return Exam(str(data), read_data(data), scoring, batch, 4)


@pytest.fixture(scope="module")
def examiner(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Examiner:
    return Examiner(str(model), exam(data), CALIBRATION, RowFolder(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def compiled(examiner: Examiner) -> CompiledVLM:
    """In four bits, with a third of the visual tokens."""
    return examiner.bench.compile(Recipe.load("quota-30").with_overrides(FAST))


@pytest.fixture(scope="module")
def rows(examiner: Examiner, compiled: CompiledVLM) -> list[Row]:
    """Full precision, and the compiled model, which is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examiner.bench, "compile", lambda recipe: compiled)
        return recipe_rows(examiner, ["quota-30"], FAST, [0])


@pytest.mark.parametrize("scoring", ["choice", "text"])
@pytest.mark.parametrize("which", ["full precision", "compiled"])
def test_answers_do_not_depend_on_batches(
    which: str, scoring: Scoring, examiner: Examiner, compiled: CompiledVLM, data: Path
) -> None:
    asked: Any = compiled if which == "compiled" else examiner.bench.model
    processor = examiner.bench.processor
    sizes: list[tuple[int, bool]] = []

    def generate(**inputs: Any) -> Any:
        sizes.append((len(inputs["input_ids"]), "pixel_values" in inputs))
        return asked.generate(**inputs)

    together = ask(generate, processor, exam(data, scoring, 4), "together")
    # The first is the check that the model takes a question without a picture.
    assert sizes == [(1, False), (3, True), (2, False)]
    alone = ask(asked.generate, processor, exam(data, scoring, 1), "alone")
    assert together == alone
    if scoring == "choice":
        assert all(given in question.choices for given, question in zip(together, read_data(data), strict=True))


def test_a_prompt_of_both_kinds_in_one_batch(examiner: Examiner, compiled: CompiledVLM, data: Path) -> None:
    """The harness keeps them apart because of padding; callers of `generate` need not."""
    questions = read_data(data)[:3]
    processor = examiner.bench.processor
    inputs = question_inputs(processor, questions)
    logits = compiled(**inputs).logits
    assert logits is not None
    for row, question in zip(logits, questions, strict=True):
        alone = compiled(**question_inputs(processor, [question])).logits
        assert alone is not None
        torch.testing.assert_close(row, alone[0], atol=1e-3, rtol=1e-3)
    kept = compiled.kept_tokens(**inputs)
    assert [int((kept[0][place] >= 0).sum()) for place in (1, 2)] == [
        question_inputs(processor, [each])["input_ids"].numel() for each in questions[1:]
    ]


def test_scores_by_group(rows: list[Row], data: Path) -> None:
    for row in rows:
        right = [mark == "1" for mark in row.right]
        assert tuple(row.groups) == COLUMNS and row.questions == len(PROBLEMS)
        assert {name: score.questions for name, score in row.groups.items()} == {
            "NAT": 2,
            "SOC": 2,
            "LAN": 1,
            "TXT": 2,
            "IMG": 3,
            "NO": 1,
            "G1-6": 3,
            "G7-12": 2,
        }
        assert row.groups == group_scores(read_data(data), right)
        assert row.groups["IMG"].right == sum(right[place] for place in (0, 3, 4))
        assert row.groups["NO"].right == right[1] and row.groups["TXT"].right == right[0] + right[2]


def test_groups_of_other_data_come_as_they_are() -> None:
    asked = [Question(None, "?", "a", groups=names) for names in (("b", "a"), (), ("NO", "a"))]
    assert group_scores(asked, [True, True, False]) == {
        "NO": GroupScore(right=0, questions=1),
        "b": GroupScore(right=1, questions=1),
        "a": GroupScore(right=1, questions=2),
    }
    assert list(group_scores(asked, [True] * 3)) == ["NO", "b", "a"]


def test_sizes_are_of_questions_with_a_picture(rows: list[Row], examiner: Examiner, data: Path) -> None:
    """They equal those of the questions with a picture alone."""
    full, low = rows
    assert full.visual_tokens == full.mean_visual_tokens == full.final_visual_tokens == low.visual_tokens == VISUAL
    assert full.flops_share == 1 and low.final_visual_tokens == 44 and len(low.kept) == 3
    assert all(len(kept["0"]) == 44 for kept in low.kept)
    pictures = [question for question in read_data(data) if question.image is not None]
    apart = Examiner(examiner.source, replace(exam(data), questions=pictures), CALIBRATION)
    apart.bench = examiner.bench
    (alone,) = recipe_rows(apart, [], [], [])
    same = ("visual_tokens", "mean_visual_tokens", "final_visual_tokens", "flops", "flops_share", "kv_bytes", "kept")
    assert [getattr(alone, name) for name in same] == [getattr(full, name) for name in same]
    assert alone.correct == full.groups["IMG"].right


def test_questions_of_text_only(examiner: Examiner, compiled: CompiledVLM, data: Path) -> None:
    """Sizes are means over all of them."""
    texts = [question for question in read_data(data) if question.image is None]
    apart = Examiner(examiner.source, replace(exam(data), questions=texts), CALIBRATION)
    apart.bench = examiner.bench
    processor = examiner.bench.processor
    for subject in (
        Subject.full_precision(examiner.bench.model, processor),
        Subject.compiled(compiled, processor),
    ):
        row = evaluate(subject, apart.exam, apart.prompts, name="", model="", id="")
        assert (row.visual_tokens, row.mean_visual_tokens, row.final_visual_tokens) == (0, 0, 0)
        assert row.flops > 0 and row.flops_share == 1 and row.kv_bytes > 0
        assert all(kept in ({}, {"0": []}) for kept in row.kept)


def test_rows_are_kept_with_their_groups(rows: list[Row], examiner: Examiner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examiner.kept is not None
    again = Examiner(examiner.source, examiner.exam, CALIBRATION, RowFolder(examiner.kept.folder))
    monkeypatch.setattr(examiner_module, "evaluate", lambda *_, **__: pytest.fail("computed again"))
    assert recipe_rows(again, ["quota-30"], FAST, [0]) == rows
    with (examiner.kept.folder / "rows.csv").open() as file:
        lines = {line["id"]: line for line in csv.DictReader(file)}
    for row in rows:
        for name, score in row.groups.items():
            line = lines[row.id]
            found = float(line[f"accuracy of {name}"]), int(line[f"questions of {name}"])
            assert found == (score.accuracy, score.questions)


def test_the_command_prints_the_table(rows: list[Row], model: Path, data: Path, examiner: Examiner) -> None:
    assert examiner.kept is not None
    words = ["eval", str(model), "--data", str(data), "--batch-size", "2", "--max-new-tokens", "4"]
    once, kept = (
        CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "160"})
        for more in ([], ["--out", str(examiner.kept.folder)])
    )
    for result in (once, kept):
        assert result.exit_code == 0, result.output
        table = [line.split("│") for line in result.stdout.splitlines() if line.count("│") == len(COLUMNS) + 3]
        questions, first = ([cell.strip() for cell in line[1:-1]] for line in table[-2:])
        assert questions == ["questions", "2", "2", "1", "2", "3", "1", "3", "2", "5"]
        accuracies = [score.accuracy for score in rows[0].groups.values()] + [rows[0].accuracy]
        assert first[1:] == [f"{100 * accuracy:.2f}" for accuracy in accuracies]


def test_an_artifact_has_the_same_scores(
    rows: list[Row], compiled: CompiledVLM, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = artifact_row("out", compiled, compiled.processor, exam(data), None)
    assert (found.groups, found.visual_tokens, found.flops) == (rows[1].groups, VISUAL, rows[1].flops)
    monkeypatch.setattr(compiled.machine, "generate", refuse_as_ours)
    with pytest.raises(CalibrationError, match="takes no question without a picture"):
        artifact_row("out", compiled, compiled.processor, exam(data), None)


# Models that need a picture


def refuse(**_: Any) -> Any:
    raise ValueError("give pixel_values")


def refuse_as_ours(**_: Any) -> Any:
    raise InputError("the model does not take these inputs")


@pytest.mark.parametrize(
    ("template", "generate", "words"),
    [
        (None, refuse, "ValueError: give pixel_values"),
        (None, refuse_as_ours, "the model does not take these inputs"),
        ("{{ raise_exception('where is it?') }}", None, "where is it"),
        ("<image> {{ messages[0]['content'][-1]['text'] }}", None, "no images were passed"),
    ],
)
def test_a_model_that_needs_a_picture(
    model: Path, data: Path, template: str | None, generate: Callable[..., Any] | None, words: str
) -> None:
    whole: Any
    whole, processor = load_model(str(model))
    processor.chat_template = template or processor.chat_template
    with pytest.raises(CalibrationError, match=f"takes no question without a picture: .*{words}") as error:
        ask(generate or whole.generate, processor, exam(data), "ask")
    assert error.value.where == f"{data / 'problems.json'}, problem 1" and "pid_splits.json" in str(error.value.do)
    check_without_picture(refuse, processor, [each for each in read_data(data) if each.image is not None])


def test_it_is_refused_before_it_is_compiled(
    examiner: Examiner, rows: list[Row], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model's own graphs too, if only they take none."""
    del rows
    again = Examiner(examiner.source, exam(data), CALIBRATION)
    again.bench = examiner.bench
    monkeypatch.setattr(Workbench, "compile", lambda *_: pytest.fail("compiled"))
    with monkeypatch.context() as patch:
        patch.setattr(type(examiner.bench.model), "generate", lambda *_, **inputs: refuse(**inputs))
        with pytest.raises(CalibrationError, match="give pixel_values"):
            again.compute("quota-30", Recipe.load("quota-30"))
    with monkeypatch.context() as patch:
        patch.setattr(examiner_module.Machine, "generate", lambda *_, **inputs: refuse_as_ours(**inputs))
        with pytest.raises(CalibrationError, match="takes no question without a picture: the model does not take"):
            again.compute("full precision", None)
