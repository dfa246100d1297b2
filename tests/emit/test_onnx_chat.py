"""Chats become the token ids that transformers makes of them, or the folder takes no chats and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor

from qpcompile.capture.chat import chat_inputs
from qpcompile.emit.onnx.runner.chat import MOST_ASKED, Chat, Pieces, Turn
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.speech import FILES, Mute, split_template, write_speech

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"
IMAGE_TOKENS = {"llava": 4, "qwen2_5_vl": 6}
SEEN = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
TALL = SEEN.resize((20, 90))
CHATS: list[list[Turn]] = [
    [Turn((SEEN,), "What color is the star?")],
    [Turn((SEEN, TALL), "which object has the digit 3 ?")],
    [Turn((), "how many objects are there?")],
    [Turn((SEEN,), "what shape is red?", "circle"), Turn((), "where is it?")],
    [Turn((SEEN,), " what\n", " a \n"), Turn((TALL,), "is\tthe", "yes"), Turn((), "unknownword, then?")],
]


def conversation(turns: list[Turn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        pictures = [{"type": "image", "image": picture} for picture in turn.pictures]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


@pytest.fixture(params=IMAGE_TOKENS)
def testbed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Chat]:
    """A processor and what the runner has of it."""
    processor = AutoProcessor.from_pretrained(TESTBEDS / request.param)
    assert write_speech(tmp_path, processor, IMAGE_TOKENS[request.param]) == ""
    return processor, Chat(tmp_path, IMAGE_TOKENS[request.param])


def test_ids_and_pixels_are_the_processors(testbed: tuple[Any, Chat]) -> None:
    """Each chat alone, and all of them as one batch that is padded on the left."""
    processor, chat = testbed
    for turns in [*([each] for each in CHATS), CHATS]:
        wanted = chat_inputs(processor, [conversation(each) for each in turns], ["here"] * len(turns))
        found = chat.inputs(turns)
        assert set(wanted) - {"mm_token_type_ids"} == set(found)
        assert all(np.array_equal(wanted[name].numpy(), value) for name, value in found.items())


def test_text_is_the_processors(testbed: tuple[Any, Chat]) -> None:
    processor, chat = testbed
    ids = [*processor.tokenizer("the star is red , not blue ?")["input_ids"], 3, 0]
    assert chat.text(ids) == processor.batch_decode([ids], skip_special_tokens=True)[0]
    assert "".join(chat.stream(iter(ids))) == chat.text(ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what is {placeholder}?", "is a token of the model"),
        ("{end} red", "is a token of the model"),
        ("a" * (MOST_ASKED + 1), "too long"),
        (None, "not text"),
    ],
)
def test_text_that_is_no_text(testbed: tuple[Any, Chat], text: Any, message: str) -> None:
    processor, chat = testbed
    names = {"placeholder": chat.pieces.placeholder, "end": processor.tokenizer.eos_token}
    said: Any = None if text is None else text.format(**names)
    with pytest.raises(RunnerError, match=message) as error:
        chat.inputs([[Turn((), said)]])
    assert error.value.do
    with pytest.raises(RunnerError, match=message):
        chat.inputs([[Turn((), "what", said), Turn((), "where")]])


# How a template may write a list of messages: a question's pictures, then its text.
ROUND = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
PARTS = "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
GOOD = {
    "default system prompt": "Be brief. " + ROUND.replace("BODY", "{{ m.role }}: " + PARTS + "\n"),
    "stripped": ROUND.replace("BODY", "{{ m.role }}: " + PARTS.replace("p.text", "p.text | trim") + "\n"),
    "pictures on lines of their own": ROUND.replace("BODY", "{{ m.role }}: " + PARTS.replace("<image>", "<image>\n")),
}
BAD = {
    "numbered pictures": (
        PARTS.replace("<image>", "Picture {{ loop.index }}: <image>"),
        "each picture in the same way",
    ),
    "text twice": (PARTS.replace("{{ p.text }}", "{{ p.text }}{{ p.text }}"), "once, as it is"),
    "text in capitals": (PARTS.replace("p.text", "p.text | upper"), "once, as it is"),
    "no picture": (PARTS.replace("<image>", ""), "each picture in the same way"),
    "pictures last": (
        "{% for p in m.content if p.type != 'image' %}{{ p.text }}{% endfor %}"
        "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}",
        "each picture in the same way",
    ),
    "numbered turns": ("{{ loop.index }}" + PARTS, "depends on more"),
    "the clock": ("{{ strftime_now('%d') }}" + PARTS, "reads the clock"),
    "one turn alone": ("{% if loop.length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + PARTS, "one turn"),
}


@pytest.fixture
def llava() -> Any:
    return AutoProcessor.from_pretrained(TESTBEDS / "llava")


@pytest.mark.parametrize("name", GOOD)
def test_templates_in_pieces(name: str, llava: Any, tmp_path: Path) -> None:
    llava.chat_template = GOOD[name]
    assert write_speech(tmp_path, llava, 4) == ""
    chat = Chat(tmp_path, 4)
    assert chat.pieces.strip == (name == "stripped")
    wanted = llava.apply_chat_template(conversation(CHATS[4]), add_generation_prompt=True, tokenize=False)
    assert chat.pieces.prompt(CHATS[4]) == wanted


@pytest.mark.parametrize(("body", "message"), BAD.values(), ids=list(BAD))
def test_templates_that_are_more_than_pieces_are_refused(body: str, message: str, llava: Any, tmp_path: Path) -> None:
    llava.chat_template = ROUND.replace("BODY", body)
    assert message in write_speech(tmp_path, llava, 4)
    assert list(tmp_path.iterdir()) == []


def changed(name: str, value: Any) -> Callable[[Any], None]:
    return lambda processor: setattr(processor, name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("chat_template", None), "no chat template"),
        (changed("tokenizer", None), "no processor"),
        (changed("image_token", "<s>"), "chat"),
        (lambda processor: setattr(processor.tokenizer, "clean_up_tokenization_spaces", True), "changes the spaces"),
        (changed("num_additional_image_tokens", 0), ""),
    ],
)
def test_processors_that_the_runner_cannot_stand_in_for(
    change: Callable[[Any], None], message: str, llava: Any, tmp_path: Path
) -> None:
    change(llava)
    found = write_speech(tmp_path, llava, 4)
    assert message in found and bool(found) == bool(message)


def test_a_runner_that_disagrees_with_the_processor_is_not_written(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpcompile.emit.onnx.runner.pictures._cropped", lambda pixels, *_: pixels[:, ::-1])
    assert "does not make the processor's pixel_values" in write_speech(tmp_path, llava, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"), [("CLIPImageProcessor", ""), ("OwnImageProcessor", "no form that computes")]
)
def test_processors_on_torchvision_have_a_twin_on_pillow(name: str, message: str, llava: Any, tmp_path: Path) -> None:
    """The part that computes with torchvision, where that is installed, is replaced by transformers' own on Pillow."""
    (tmp_path / "wanted").mkdir()
    assert write_speech(tmp_path / "wanted", llava, 4) == ""
    kept = llava.image_processor.to_dict()
    llava.image_processor = type(name, (), {"to_dict": lambda _: kept})()
    found = write_speech(tmp_path, llava, 4)
    assert message in found and bool(found) == bool(message)
    if not message:
        assert (tmp_path / "pictures.json").read_text() == (tmp_path / "wanted" / "pictures.json").read_text()
    assert type(llava.image_processor).__name__ == name


def test_split_names_what_differs() -> None:
    with pytest.raises(Mute, match="once, as it is"):
        split_template(lambda turns: "the same for all", "<image>")


def test_characters_of_several_tokens_are_streamed_whole(llava: Any, tmp_path: Path) -> None:
    """A byte-level tokenizer without merges: an umlaut is two tokens, and half of one may end an answer."""
    assert write_speech(tmp_path, llava, 4) == ""
    chat = Chat(tmp_path, 4)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    chat.tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    chat.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chat.tokenizer.decoder = decoders.ByteLevel()
    ids = chat.tokenizer.encode("größer 猫").ids
    parts = list(chat.stream(iter(ids)))
    assert "".join(parts) == "größer 猫" and parts[2] == "ö"
    cut = list(chat.stream(iter(ids[:3])))
    assert "".join(cut) == chat.text(ids[:3]) and cut[:2] == ["g", "r"]
    for seed in range(200):
        # Bytes at random: hardly any are characters.
        drawn = np.random.default_rng(seed).integers(0, len(letters), 12).tolist()
        assert "".join(chat.stream(iter(drawn))) == chat.text(drawn)


SETTINGS: list[tuple[str, Any, str]] = [
    *[("extra", 1, "extra"), ("end", 5, "5"), ("end", "x" * 2**17, "xxx"), ("special", 1, "special is 1")],
    *[("pad", -1, "pad is -1"), ("control", ["a"], "control"), ("control", 7, "control is not a list")],
    *[("first", {"open": ""}, "first is not"), ("later", {"open": "", "image": "", "text": ""}, "placeholder")],
    *[("placeholder", "", "placeholder"), ("reserved", [1], "no text"), ("strip", None, "strip")],
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS)
def test_impossible_settings_are_refused(name: str, value: Any, message: str, llava: Any, tmp_path: Path) -> None:
    assert write_speech(tmp_path, llava, 4) == ""
    stored = json.loads((tmp_path / "chat.json").read_text())
    assert Pieces.read(stored, "chat.json").placeholder == "<image>"
    with pytest.raises(RunnerError, match=message) as error:
        Pieces.read(stored | {name: value}, "chat.json")
    assert error.value.where == "chat.json" and error.value.do


def test_a_missing_setting_is_refused(llava: Any, tmp_path: Path) -> None:
    assert write_speech(tmp_path, llava, 4) == "" and {path.name for path in tmp_path.iterdir()} == set(FILES)
    stored = json.loads((tmp_path / "chat.json").read_text())
    with pytest.raises(RunnerError, match="missing: end"):
        Pieces.read({name: value for name, value in stored.items() if name != "end"}, "chat.json")


def renamed(rules: dict[str, Any]) -> None:
    rules["added_tokens"][4]["content"] = "<other>"
    vocabulary = rules["model"]["vocab"]
    vocabulary["<other>"] = vocabulary.pop("<image>")


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an expression that never ends": (
        lambda rules: rules.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        "repeats what has repeats",
    ),
    "no model": (lambda rules: rules.pop("model"), "cannot be read"),
    "another kind": (lambda rules: rules.update(model={"type": "Unheard"}), "cannot be read"),
    "another token": (renamed, "is not the token 4"),
}


@pytest.mark.parametrize(("change", "message"), TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_hostile_tokenizers(change: Callable[[dict[str, Any]], Any], message: str, llava: Any, tmp_path: Path) -> None:
    assert write_speech(tmp_path, llava, 4) == ""
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    change(rules)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(RunnerError, match=message) as error:
        Chat(tmp_path, 4)
    assert "tokenizer.json" in error.value.where and error.value.do
