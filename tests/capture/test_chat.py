"""Inputs made from conversations equal the processor's own template and `__call__`, for one and for many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AddedToken, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor

from qpcompile.capture.blank import blank_sample
from qpcompile.capture.chat import Conversation, about_picture, chat_inputs
from qpcompile.capture.data_folder import Question, check_questions, question_inputs, read_questions
from qpcompile.errors import CalibrationError

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
BOS = 2
WORDS = ["[UNK]", "<pad>", "<s>", "</s>", "where", "is", "the", "star", "?"]
QUESTIONS = ["where ?", "where is the star ?", "is the star ?"]
SIZE = {"height": 56, "width": 56}


def tokenizer(special: list[str], *, adds_bos: bool = False, plain: tuple[str, ...] = (), **names: str) -> Any:
    """Words between spaces; `special` tokens, and `plain` ones that are added but not special."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, *special, *plain])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if adds_bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])  # type: ignore[assignment]
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        extra_special_tokens=names,
    )
    for name in special:
        found.add_tokens(AddedToken(name, special=True), special_tokens=True)
    for name in plain:
        found.add_tokens(AddedToken(name, special=False, normalized=False))
    return found


def template(mark: str, before: str = "", after: str = "") -> str:
    part = "{% if part['type'] == 'image' %}" + mark + "{% else %} {{ part['text'] }}{% endif %}"
    turn = "{% for m in messages %}{% for part in m['content'] %}" + part + "{% endfor %}{% endfor %}"
    return before + turn + after


def llava(before: str = "", after: str = "", **options: Any) -> LlavaProcessor:
    """Pictures of 4 tokens."""
    images = CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    words = tokenizer(["<image>"], image_token="<image>", **options)
    return LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", before, after),
    )


def gemma() -> Gemma3Processor:
    special = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    names = dict(zip(("boi_token", "eoi_token", "image_token"), special, strict=True))
    text = template("<start_of_image>", before="<s>")
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=SIZE),
        tokenizer(special, adds_bos=True, **names),
        chat_template=text,
        image_seq_length=4,
    )


def mllama() -> MllamaProcessor:
    words = tokenizer(["<|image|>", "<|python_tag|>"])
    return MllamaProcessor(MllamaImageProcessorPil(size=SIZE), words, chat_template=template("<|image|>"))


def shipped(name: str) -> Callable[[], Any]:
    return lambda: AutoProcessor.from_pretrained(TESTBED / name)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "gemma": gemma,
    "mllama": mllama,
    "testbed llava": shipped("llava"),
    "testbed qwen": shipped("qwen2_5_vl"),
}


def asked(question: str, colour: str = "red", size: int = 64) -> Conversation:
    return about_picture(Image.new("RGB", (size, size), colour), question)


def places(count: int) -> list[str]:
    return [f"line {number}" for number in range(1, count + 1)]


# What is made


@pytest.mark.parametrize("name", PROCESSORS)
def test_inputs_are_those_of_apply_chat_template(name: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]()
    picture = tmp_path / "a.png"
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture)
    ours = question_inputs(processor, [Question(picture, "where ?", "")])
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "where ?"}]
    settings: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, **settings
    )
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("before", ["", "<s>"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_there_is_one_first_token_at_most(before: str, adds_bos: bool) -> None:
    inputs = chat_inputs(llava(before, adds_bos=adds_bos), [asked("where ?"), asked("where is the star ?")], places(2))
    assert (inputs["input_ids"] == BOS).sum(dim=1).tolist() == [int(bool(before) or adds_bos)] * 2


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_batch_is_its_questions_one_at_a_time(name: str) -> None:
    processor = PROCESSORS[name]()
    rows = [asked(text, colour) for text, colour in zip(QUESTIONS, ("red", "blue", "white"), strict=True)]
    batch = chat_inputs(processor, rows, places(3))
    alone = [chat_inputs(processor, [row], places(1)) for row in rows]
    for number, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        ids, mask = batch["input_ids"][number], batch["attention_mask"][number]
        assert ids[-length:].tolist() == one["input_ids"][0].tolist()
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
    pixels = torch.cat([one["pixel_values"] for one in alone])
    assert torch.equal(batch["pixel_values"], pixels)


def test_the_processor_stays_as_it_was() -> None:
    processor = llava()
    chat_inputs(processor, [asked(text) for text in QUESTIONS], places(3))
    assert processor.tokenizer.padding_side == "right"


def test_one_question_needs_no_padding_token() -> None:
    processor = llava()
    processor.tokenizer.pad_token = None
    assert chat_inputs(processor, [asked("where ?")], places(1))["input_ids"].shape == (1, 6)


def test_text_alone_is_a_conversation_too() -> None:
    talk: Conversation = [{"role": "user", "content": [{"type": "text", "text": "where is the star ?"}]}]
    inputs = chat_inputs(llava(), [talk], places(1))
    assert inputs["input_ids"].tolist() == [[4, 5, 6, 7, 8]] and "pixel_values" not in inputs


def test_the_blank_sample_goes_the_same_road() -> None:
    processor = llava("<s>", adds_bos=True)
    sample = blank_sample(SimpleNamespace(name_or_path=""), processor)  # type: ignore[arg-type]
    assert int((sample["input_ids"] == BOS).sum()) == 1
    right = chat_inputs(processor, [asked("what is this?", "white", 224)], places(1))
    assert all(torch.equal(sample[key], right[key]) for key in right)


# What is refused


@pytest.mark.parametrize(
    ("typed", "token"),
    [
        ("where is <image> ?", "<image>"),
        ("where</s>", "</s>"),
        ("<s> where ?", "<s>"),
        ("<pad>", "<pad>"),
        ("<|user|> where ?", "<|user|>"),
    ],
)
def test_a_typed_token_is_refused_by_its_name(typed: str, token: str) -> None:
    processor = llava(plain=("<|user|>", "star"), before="<|user|>", after="star")
    chat_inputs(processor, [asked("where is the star ?")], places(1))  # an added word is not a control token
    with pytest.raises(CalibrationError, match="is a token of the model and not text") as error:
        chat_inputs(processor, [asked("where ?"), asked(typed)], places(2))
    assert repr(token) in error.value.what and error.value.where == "line 2" and error.value.do


@pytest.mark.parametrize(
    ("bed", "typed"),
    [("llava", "<image>"), ("llava", "<|assistant|>"), ("qwen2_5_vl", "<|im_end|>"), ("qwen2_5_vl", "<|video_pad|>")],
)
def test_typed_tokens_of_the_testbeds(bed: str, typed: str) -> None:
    question = Question(
        TESTBED / "calibration" / "llava" / "00000.png", f"what{typed}?", "", place="data.jsonl, line 7"
    )
    for check in (check_questions, question_inputs):
        with pytest.raises(CalibrationError) as error:
            check(shipped(bed)(), [question])
        assert repr(typed) in error.value.what and error.value.where == "data.jsonl, line 7"


def test_a_choice_with_a_token_in_it_is_refused() -> None:
    (question, *_) = read_questions(TESTBED / "calibration" / "llava")
    question = Question(question.image, "what?", "red", ("red", "</s>"), "line 4")
    with pytest.raises(CalibrationError, match="'</s>'") as error:
        check_questions(shipped("llava")(), [question])
    assert error.value.where == "line 4"


def test_words_that_nobody_knows_are_text() -> None:
    inputs = chat_inputs(llava(), [asked("zebra <unknown> [UNK] < image >")], places(1))
    assert int((inputs["input_ids"] == 9).sum()) == 4  # the picture's tokens only


def test_a_processor_without_a_template_is_refused() -> None:
    processor = llava()
    processor.chat_template = None
    with pytest.raises(CalibrationError, match="has no chat template") as error:
        chat_inputs(processor, [asked("where ?")], places(1))
    assert error.value.where == "line 1: LlavaProcessor" and error.value.do


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no pictures here') }}",
        "{% for message in messages %}",
        "{{ messages[0]['content'][5]['text'] }}",
        "<image><image> {{ messages[0]['content'][1]['text'] }}",
    ],
)
def test_a_template_that_refuses_names_the_line(text: str) -> None:
    processor = llava()
    processor.chat_template = text
    for rows in (1, 2):
        with pytest.raises(CalibrationError, match="makes no model inputs of this") as error:
            chat_inputs(processor, [asked("where ?")] * rows, places(rows))
        assert error.value.where == "line 1" and error.value.do


def test_of_a_batch_the_row_that_is_refused_is_named() -> None:
    processor = llava()
    processor.chat_template = (
        "{% if 'star' in messages[0]['content'][1]['text'] %}{{ raise_exception('no star') }}{% endif %}"
    )
    processor.chat_template += template("<image>")
    with pytest.raises(CalibrationError, match="no star") as error:
        chat_inputs(processor, [asked("where ?"), asked("the star ?"), asked("where ?")], places(3))
    assert error.value.where == "line 2"
    processor.tokenizer.pad_token = None
    with pytest.raises(CalibrationError, match="pad") as error:
        chat_inputs(processor, [asked("where ?"), asked("where where ?")], places(2))
    assert error.value.where == "line 1 to line 2, together"
