"""Every line of a data folder is a question, or is refused with its number before anything is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers import AutoProcessor

from qpcompile.capture.data_folder import Question, check_questions, first_pictures, question_inputs, read_questions
from qpcompile.capture.data_line import KEYS, MOST_LINE_BYTES
from qpcompile.errors import CalibrationError

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
GOOD: dict[str, Any] = {"image": "a.png", "question": "what is it?", "answer": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    Image.new("RGB", (8, 8), "red").save(place / "a.png")
    return place


def write(folder: Path, *lines: Any) -> Path:
    """data.jsonl of these lines: bytes and text as they are, other values as JSON."""
    raw = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else dumped(line) for line in lines
    ]
    (folder / "data.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return folder


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def only(folder: Path, line: Any) -> Question:
    (question,) = read_questions(write(folder, line))
    return question


# What is accepted


def test_a_documented_line(folder: Path) -> None:
    line = GOOD | {"choices": ["red", "blue"]}
    question = only(folder, line)
    assert question == Question(folder / "a.png", "what is it?", "red", ("red", "blue"))
    assert question.place == f"{folder / 'data.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("0", "0"),
        ("-7", "-7"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ('" 0 "', "0"),
        ('"true"', "true"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_answers_are_what_is_written(folder: Path, written: str, answer: str) -> None:
    question = only(folder, f'{{"image": "a.png", "question": "?", "answer": {written}, "choices": ["no", {written}]}}')
    assert (question.answer, question.choices) == (answer, ("no", answer))


@pytest.mark.parametrize(
    "inside",
    ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\t", "\u3000", "é 日本 🙂", "\ufeff"],
)
def test_characters_that_are_text_stay_text(folder: Path, inside: str) -> None:
    text = f"what{inside}is it?"
    found = read_questions(write(folder, GOOD | {"question": text}, json.dumps(GOOD | {"question": text})))
    assert [question.question for question in found] == [text, text]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n\n", b"\n \t\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks(folder: Path, end: bytes, start: bytes) -> None:
    (folder / "data.jsonl").write_bytes(start + dumped(GOOD) + end + dumped(GOOD | {"answer": "blue"}))
    assert [question.answer for question in read_questions(folder)] == ["red", "blue"]


def test_blank_lines_are_counted(folder: Path) -> None:
    write(folder, GOOD, "", GOOD)
    assert [question.place.rsplit(" ", 1)[1] for question in read_questions(folder)] == ["1", "3"]


def test_groups_of_a_line(folder: Path) -> None:
    assert only(folder, GOOD | {"groups": [" animals ", 7]}).groups == ("animals", "7")
    assert [only(folder, GOOD | {"groups": given}).groups for given in (None, [])] == [(), ()]


def test_other_columns_have_no_meaning(folder: Path) -> None:
    extra = {
        "id": 7,
        "question_id": "q7",
        "category": None,
        "image_id": 3,
        "bbox": [[1, 2]],
        "meta": {"answer": "blue"},
    }
    assert only(folder, GOOD | extra) == only(folder, GOOD)
    # A column name of another format, beside ours, has no meaning.
    assert only(folder, GOOD | {"answers": ["red", "crimson"]}) == only(folder, GOOD)


def test_no_choices_may_be_said(folder: Path) -> None:
    assert only(folder, GOOD | {"choices": None}).choices == ()


def test_pictures_anywhere(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    (folder / "a.png").rename(outside)
    (folder / "link.png").symlink_to(outside)
    for name in (str(outside), "../outside.png", "link.png"):
        assert only(folder, GOOD | {"image": name}).picture.resolve() == outside


def test_first_pictures_are_different_ones(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    write(folder, GOOD, GOOD | {"question": "and now?"}, GOOD | {"image": "b.png"}, GOOD)
    assert first_pictures(folder, 3) == [(folder / "a.png", "what is it?"), (folder / "b.png", "what is it?")]


# What is refused

LINES: dict[str, tuple[Any, str]] = {
    "text": ("what is it?", "it is not JSON"),
    "half an object": ('{"image": "a.png"', "it is not JSON"),
    "two objects": (dumped(GOOD) + b" " + dumped(GOOD), "it is not JSON"),
    "old line ends": (dumped(GOOD) + b"\r" + dumped(GOOD), "it is not JSON"),
    "list": ([GOOD], "it is a list, not an object"),
    "number": ("7", "it is a number, not an object"),
    "null": ("null", "it is null, not an object"),
    "latin 1": ('{"question": "é"}'.encode("latin-1"), "it is not UTF-8"),
    "utf 16": ("{}".encode("utf-16"), "it is not UTF-8"),
    "nan": (GOOD | {"score": float("nan")}, "NaN is not JSON"),
    "infinity": (GOOD | {"answer": float("-inf")}, "-Infinity is not JSON"),
    "twice": (
        '{"image": "a.png", "question": "?", "answer": "no", "answer": "yes"}',
        "the key 'answer' is there twice",
    ),
    "deep": (b"[" * 100_000, "it is not JSON"),
    "long": (GOOD | {"note": "n" * MOST_LINE_BYTES}, "it is longer than 1,048,576 bytes"),
    "no image": ({"question": "?", "answer": "red"}, "the key 'image' is missing"),
    "no question": ({"image": "a.png", "answer": "red"}, "the key 'question' is missing"),
    "no answer": ({"image": "a.png", "question": "?"}, "the key 'answer' is missing"),
    "answers": ({"image": "a.png", "question": "?", "answers": ["red"]}, "the key 'answers' is unknown"),
    "Image": ({"Image": "a.png", "question": "?", "answer": "red"}, "the key 'Image' is unknown"),
    "options": (GOOD | {"options": ["red", "blue"]}, "the key 'options' is unknown"),
    "choice": (GOOD | {"choice": ["red", "blue"]}, "the key 'choice' is unknown"),
    "image number": (GOOD | {"image": 7}, "image is a number, not a text"),
    "images": (GOOD | {"image": ["a.png"]}, "image is a list, not a text"),
    "image empty": (GOOD | {"image": ""}, "image is empty"),
    "image missing": (GOOD | {"image": "no.png"}, "the picture no.png is missing"),
    "image folder": (GOOD | {"image": "."}, "the picture . is missing, or is not a file"),
    "image address": (GOOD | {"image": "https://a.b/c.png"}, "the picture https://a.b/c.png is missing"),
    "image nul": (GOOD | {"image": "a\0.png"}, "is missing"),
    "image name too long": (GOOD | {"image": "n" * 5000}, "is missing"),
    "question list": (GOOD | {"question": ["what?"]}, "question is a list, not a text"),
    "question number": (GOOD | {"question": 7}, "question is a number, not a text"),
    "question blank": (GOOD | {"question": " \n"}, "question is empty"),
    "question surrogate": (b'{"image": "a.png", "question": "\\ud83d", "answer": "red"}', "half of a surrogate pair"),
    "answer list": (GOOD | {"answer": ["red"]}, "answer is a list, not a text or a number"),
    "answer null": (GOOD | {"answer": None}, "answer is null"),
    "answer true": (GOOD | {"answer": True}, "answer is true"),
    "answer object": (GOOD | {"answer": {}}, "answer is an object"),
    "answer empty": (GOOD | {"answer": ""}, "answer is empty"),
    "choices text": (GOOD | {"choices": "red"}, "choices is a text, not a list"),
    "choices object": (GOOD | {"choices": {"A": "red"}}, "choices is an object, not a list"),
    "choices none": (GOOD | {"choices": []}, "choices has 0 entries"),
    "choices one": (GOOD | {"choices": ["red"]}, "choices has 1 entries"),
    "choices list": (GOOD | {"choices": ["red", ["blue"]]}, r"choices\[1\] is a list"),
    "choices null": (GOOD | {"choices": ["red", None]}, r"choices\[1\] is null"),
    "choices empty": (GOOD | {"choices": ["red", ""]}, r"choices\[1\] is empty"),
    "groups of another kind": (GOOD | {"groups": "animals"}, "groups is a text, not a list"),
    "a group of another kind": (GOOD | {"groups": [["animals"]]}, r"groups\[0\] is a list, not a text or a number"),
    "an empty group": (GOOD | {"groups": [" "]}, r"groups\[0\] is empty"),
    "groups twice": (GOOD | {"groups": ["a", "b", "a "]}, "groups holds 'a' twice"),
    "groups by another name": (GOOD | {"group": ["a"]}, "the key 'group' is unknown"),
    "choices twice": (GOOD | {"choices": ["red", "blue", "red "]}, "choices holds 'red' twice"),
    "choices without the answer": (GOOD | {"choices": ["green", "blue"]}, "the answer 'red' is none of the choices"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=list(LINES))
def test_what_is_wrong_is_named(folder: Path, line: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        read_questions(write(folder, GOOD, line))
    assert error.value.where == f"{folder / 'data.jsonl'}, line 2" and error.value.do
    assert len(str(error.value)) < 1_000


def test_all_wrong_lines_are_counted(folder: Path) -> None:
    wrong = GOOD | {"answer": None}
    for others, words in ((1, r"\(1 more line is wrong\)"), (3, r"\(3 more lines are wrong\)")):
        with pytest.raises(CalibrationError, match=words) as error:
            read_questions(write(folder, GOOD, wrong, *[GOOD | {"choices": "red"}] * others, GOOD))
        assert error.value.where and error.value.where.endswith("line 2") and "answer is null" in error.value.what


def test_a_line_after_a_long_one_is_read_for_itself(folder: Path) -> None:
    write(folder, GOOD | {"note": "n" * (3 * MOST_LINE_BYTES)}, GOOD, "no line")
    with pytest.raises(CalibrationError, match=r"1 more line is wrong") as error:
        read_questions(folder)
    assert error.value.where and error.value.where.endswith("line 1")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_data_file_that_is_none(folder: Path, make: Callable[[Path], Any]) -> None:
    make(folder / "data.jsonl")
    with pytest.raises(CalibrationError, match=r"there is no data\.jsonl"):
        read_questions(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a.png", "red"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from([*KEYS, "answers", "id", "Choices"]), JSON, max_size=4),
    drop=st.sampled_from(["", *KEYS]),
)
def test_any_value_of_any_key_is_a_question_or_refused(folder: Path, changes: dict[str, Any], drop: str) -> None:
    line = {key: value for key, value in (GOOD | changes).items() if key != drop}
    try:
        question = only(folder, json.dumps(line))
    except CalibrationError as error:
        assert error.where and error.where.endswith("line 1") and error.do
    else:
        assert question.picture.is_file() and all(
            isinstance(text, str) and text for text in (question.question, question.answer)
        )
        assert not question.choices or question.answer in question.choices


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=64))
def test_any_bytes_are_questions_or_refused(folder: Path, raw: bytes) -> None:
    (folder / "data.jsonl").write_bytes(raw)
    try:
        read_questions(folder)
    except CalibrationError as error:
        assert error.where and error.do


# The pictures of a folder


def test_pictures_are_read_upright(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(TESTBED / "llava")
    scene = Image.new("RGB", (96, 96), "white")
    scene.paste("red", (0, 0, 96, 32))
    scene.save(folder / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(folder / "phone.png", exif=exif)
    upright, phone = (
        Question(folder / name, "what color is the star?", "red") for name in ("upright.png", "phone.png")
    )
    first, second = (question_inputs(processor, [question])["pixel_values"] for question in (upright, phone))
    np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize("check", [check_questions, question_inputs])
def test_a_file_that_is_no_picture_names_the_line(folder: Path, check: Callable[..., Any]) -> None:
    (folder / "b.png").write_text("no picture")
    questions = read_questions(write(folder, GOOD, GOOD | {"image": "b.png"}))
    with pytest.raises(CalibrationError, match=r"b\.png is not a picture that can be read") as error:
        check(AutoProcessor.from_pretrained(TESTBED / "llava"), questions)
    assert error.value.where == f"{folder / 'data.jsonl'}, line 2"
