"""ScienceQA's official layout: lettered choices, hint first, with and without a picture; groups of published tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qpcompile.errors import CalibrationError
from qpcompile.evaluate.questions.data_sets import questions_digest, read_data
from qpcompile.evaluate.questions.scienceqa import COLUMNS, INSTRUCTION, read_scienceqa


def problem(**changes: Any) -> dict[str, Any]:
    entry = {
        "question": "Which is red?",
        "choices": ["the star", "the heart", "the cross"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "lecture": "",
        "solution": "",
    }
    return {**entry, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five problems; "5" and "6" have no picture, "9" is of another split."""
    problems = {
        "2": problem(split="test"),
        "5": problem(image=None, subject="social science", grade="grade6", split="test"),
        "6": problem(image="", hint=None, subject="language science", grade="grade7", split="test"),
        "7": problem(hint="", choices=["yes", "no"], answer=0, grade="grade12", split="test"),
        "9": problem(split="train"),
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["9"], "val": [], "test": ["7", "2", "5", "6"]}))
    for split, number in (("test", "2"), ("test", "7"), ("train", "9")):
        place = tmp_path / "images" / split / number
        place.mkdir(parents=True)
        Image.new("RGB", (20, 12), "red").save(place / "image.png")
    return tmp_path


def test_prompt_choices_and_answer(folder: Path) -> None:
    first, second, third, last = read_scienceqa(folder)
    assert (first.answer, first.choices, second.answer, second.choices) == ("A", ("A", "B"), "B", ("A", "B", "C"))
    assert first.question == f"Which is red?\nA. yes\nB. no\n{INSTRUCTION}"
    assert second.question.startswith("Context: Look at the picture.\nWhich is red?\nA. the star\nB. the heart\n")
    assert second.image == folder / "images" / "test" / "2" / "image.png"
    assert (third.image, last.image) == (None, None) and third.question == second.question
    assert last.question == second.question.removeprefix("Context: Look at the picture.\n")
    assert last.where == f"{folder / 'problems.json'}, problem 6"


def test_columns_of_published_tables(folder: Path) -> None:
    """Text context is a hint, which questions with a picture may have too; no context is neither."""
    groups = [question.groups for question in read_scienceqa(folder)]
    assert groups == [
        ("NAT", "IMG", "G7-12"),
        ("NAT", "TXT", "IMG", "G1-6"),
        ("SOC", "TXT", "G1-6"),
        ("LAN", "NO", "G7-12"),
    ]
    assert {name for names in groups for name in names} == {*COLUMNS}


def test_a_digest_is_of_pictures_and_groups(folder: Path) -> None:
    """Without groups it is that of earlier versions, whose rows are found by it."""
    plain = [replace(question, groups=()) for question in read_scienceqa(folder)]
    other = [replace(question, groups=(*question.groups, "one more")) for question in read_scienceqa(folder)]
    shown = [replace(question, image=plain[0].image) for question in read_scienceqa(folder)]
    assert len({*map(questions_digest, (plain, other, shown, read_scienceqa(folder)))}) == 4
    total = hashlib.sha256()
    for each in plain[:2]:
        assert each.image is not None
        line = [each.image.name, each.image.stat().st_size, each.question, each.answer, *each.choices]
        total.update(json.dumps(line).encode())
    assert questions_digest(plain[:2]) == total.hexdigest()


def test_the_layout_is_recognised_and_the_split_chosen(folder: Path) -> None:
    assert read_data(folder) == read_scienceqa(folder, "test")
    assert [question.answer for question in read_data(folder, "train")] == ["B"]
    assert questions_digest(read_data(folder)) != questions_digest(read_data(folder, "train"))


@pytest.mark.parametrize(
    ("split", "changes", "words"),
    [
        ("fall", {}, "no split 'fall'"),
        ("val", {}, "no question to ask"),
        ("test", {"answer": 3}, "answer 3 is not an index of 3 choices"),
        ("test", {"answer": -1}, "not in ScienceQA's format: answer"),
        ("test", {"answer": "1"}, "not in ScienceQA's format: answer"),
        ("test", {"choices": None}, "not in ScienceQA's format: choices"),
        ("test", {"choices": "red"}, "not in ScienceQA's format: choices"),
        ("test", {"choices": ["a", 2]}, "not in ScienceQA's format: choices.1"),
        ("test", {"choices": ["a"] * 27}, "not in ScienceQA's format: choices"),
        ("test", {"question": 7}, "not in ScienceQA's format: question"),
        ("test", {"hint": []}, "not in ScienceQA's format: hint"),
        ("test", {"image": 7}, "not in ScienceQA's format: image"),
        ("test", {"subject": None}, "not in ScienceQA's format: subject"),
        ("test", {"subject": "art"}, "not in ScienceQA's format: subject"),
        ("test", {"grade": 2}, "not in ScienceQA's format: grade"),
        ("test", {"grade": "grade0"}, "not in ScienceQA's format: grade"),
        ("test", {"grade": "grade13"}, "not in ScienceQA's format: grade"),
        ("test", {"grade": "grade1\n"}, "not in ScienceQA's format: grade"),
        ("test", {"image": "."}, "picture of problem 2 is missing"),
        ("test", {"image": "other.png"}, "picture of problem 2 is missing"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, split: str, changes: dict[str, Any], words: str) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    problems["2"] |= changes
    (folder / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(CalibrationError, match=words):
        read_data(folder, split)


@pytest.mark.parametrize(
    ("problems", "splits", "words"),
    [
        ([], {"test": []}, "holds no JSON object"),
        ({}, [], "holds no JSON object"),
        ({}, {"test": "7"}, "not a list of problem numbers"),
        ({}, {"test": [7]}, "not a list of problem numbers"),
        ({}, {"test": ["7"]}, "not in ScienceQA's format: the entry"),
        ({"7": None}, {"test": ["7"]}, "not in ScienceQA's format: the entry"),
    ],
)
def test_files_of_other_contents_are_named(folder: Path, problems: Any, splits: Any, words: str) -> None:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(CalibrationError, match=words) as error:
        read_data(folder)
    assert error.value.where and str(folder) in error.value.where and error.value.do


def test_a_file_that_is_no_picture_is_named_before_anything_is_asked(folder: Path) -> None:
    (folder / "images" / "test" / "7" / "image.png").write_text("no picture")
    with pytest.raises(CalibrationError, match="is not a picture that can be read") as error:
        read_data(folder)
    assert error.value.where == f"{folder / 'problems.json'}, problem 7"


def test_a_folder_of_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"neither data.jsonl nor problems.json"):
        read_data(tmp_path)
