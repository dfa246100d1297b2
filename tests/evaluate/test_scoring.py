"""Choices: the most probable one is found, whatever its length; a generated text that names one is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from qpcompile.capture.data_folder import Question, question_inputs
from qpcompile.capture.load import load_model
from qpcompile.capture.right_answers import named_choice, right_answers
from qpcompile.evaluate.questions.scoring import choose

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
PICTURE = TESTBED / "calibration" / "llava" / "00000.png"
LETTERS = ("A", "B", "C")


@pytest.fixture(scope="module")
def bed() -> tuple[Any, Any]:
    model, processor = load_model(TESTBED / "llava")
    processor.tokenizer.padding_side = "left"
    return model, processor


def question(text: str, answer: str, choices: Sequence[str]) -> Question:
    return Question(PICTURE, text, answer, tuple(choices))


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. because it is red", "B"),
        ("The answer is B.", "B"),
        ("b", "B"),
        ("D", None),
        ("Because", None),
        ("A or B", "A"),
        ("", None),
    ],
)
def test_a_letter_in_a_text(text: str, choice: str | None) -> None:
    assert named_choice(text, LETTERS) == choice


def test_words_in_a_text() -> None:
    assert named_choice(" Red. ", ("red", "blue")) == "red"
    assert named_choice("reddish", ("red", "blue")) is None
    assert named_choice("x", ("X", "x")) is None


def test_right_is_the_truth_itself_or_what_names_it() -> None:
    asked = [question("?", "B", LETTERS), question("?", "B", LETTERS), question("?", "B", ()), question("?", "B", ())]
    assert right_answers(asked, ["B. red", "A", "B", "B. red"]) == [True, False, True, False]


def log_probability(model: Any, processor: Any, asked: Question, choice: str, *, end: bool) -> float:
    """By one forward over prompt and choice: the definition, without `generate`."""
    inputs = question_inputs(processor, [asked])
    tokens = processor.tokenizer.encode(choice, add_special_tokens=False) + [processor.tokenizer.eos_token_id] * end
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].log_softmax(dim=-1)
    return float(sum(logits[length + place - 1, token] for place, token in enumerate(tokens)))


@pytest.mark.parametrize(
    "choices",
    [
        ("red", "blue", "star", "7", "yes"),
        ("red star", "blue", "top left heart", "white", "the white heart"),
        ("what", "what what", "what what what"),
    ],
    ids=["one token", "several tokens", "prefixes of each other"],
)
def test_the_most_probable_choice_wins(bed: tuple[Any, Any], choices: tuple[str, ...]) -> None:
    model, processor = bed
    texts = ("what color is the heart?", "where is the white heart?", "how many red objects are there?")
    asked = [question(text, "", choices) for text in texts]
    short = all(len(processor.tokenizer.encode(choice, add_special_tokens=False)) == 1 for choice in choices)
    expected = []
    for one in asked:
        scores = [log_probability(model, processor, one, choice, end=not short) for choice in choices]
        assert all(math.isfinite(score) for score in scores)
        expected.append(choices[scores.index(max(scores))])
    assert choose(model.generate, processor, asked) == expected


def test_choices_after_an_encoder(bed: tuple[Any, Any]) -> None:
    """The decoder starts with one token of its own: whatever is likeliest there, a choice is generated whole."""
    _, processor = bed
    asked = [question("where?", "", ("top left heart", "white")), question("what?", "", ("red star", "blue"))]

    def generate(prefix_allowed_tokens_fn: Any, **_: Any) -> torch.Tensor:
        rows = torch.full((len(asked), 1), processor.tokenizer.eos_token_id)
        for _step in range(4):
            # The first choice's token, of a greedy decoder that finds it likeliest.
            firsts = [processor.tokenizer.encode(each.choices[0], add_special_tokens=False) for each in asked]
            allowed = [prefix_allowed_tokens_fn(place, row) for place, row in enumerate(rows)]
            new = [next((t for t in row if t in first), row[0]) for row, first in zip(allowed, firsts, strict=True)]
            rows = torch.cat([rows, torch.tensor(new)[:, None]], dim=1)
        return rows

    assert choose(generate, processor, asked) == ["top left heart", "red star"]


def test_questions_of_a_batch_have_their_own_choices(bed: tuple[Any, Any]) -> None:
    model, processor = bed
    asked = [question("what color is the heart?", "", ("red", "blue")), question("where?", "", ("star", "7", "no"))]
    together = choose(model.generate, processor, asked)
    assert together == [choose(model.generate, processor, [one])[0] for one in asked]
    assert together[0] in asked[0].choices and together[1] in asked[1].choices


def test_processor_is_the_testbeds_own() -> None:
    """The tokens above are words of its vocabulary, not unknown ones."""
    tokenizer = AutoProcessor.from_pretrained(TESTBED / "llava").tokenizer
    assert tokenizer.unk_token_id not in tokenizer.encode("red blue star 7 yes white what", add_special_tokens=False)
