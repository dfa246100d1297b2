"""Write what an ONNX folder needs to take questions and pictures: tokenizer, picture settings, chat template.

    tokenizer.json    as the tokenizers package reads it
    pictures.json     the settings of a processor of a known kind (runner/pictures.py)
    chat.json         what the chat template writes around pictures, questions and answers (runner/chat.py)

The three are then compared with the processor itself, on chats and pictures of several shapes: ids and pixel values
must be equal, or the folder gets none of them and the reason is told.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qpcompile.emit.onnx.runner.chat import Ask, Chat, Pieces, Turn
from qpcompile.emit.onnx.runner.folder import CHAT, PICTURES, TOKENIZER, RunnerError
from qpcompile.emit.onnx.runner.pictures import FIXED, PATCHES_KIND
from qpcompile.special_tokens import control_tokens, placeholders

FILES = (TOKENIZER, PICTURES, CHAT)
# Words that no template writes; without white space, so that a template that strips texts leaves them whole.
QUESTIONS, ANSWERS = (
    ("firstquestionxyz", "secondquestionxyz", "thirdquestionxyz"),
    ("firstanswerxyz", "secondanswerxyz"),
)
# What a processor returns beside the runner's inputs that says nothing new.
_SAID_BY_IDS = ("mm_token_type_ids", "token_type_ids")
_SHAPES = ((37, 53), (64, 48), (20, 90), (5, 5))

Render = Callable[[Sequence[Turn]], str]


class Mute(Exception):
    """Why a folder cannot take questions."""


def write_speech(folder: Path, processor: Any, image_token: int) -> str:
    """Write the three files, checked against `processor`; why there are none, "" if there are.

    image_token: the id of the placeholder of pictures.
    """
    try:
        _write(folder, processor, image_token)
    except (Mute, RunnerError) as error:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        return error.what if isinstance(error, RunnerError) else str(error)
    return ""


def _write(folder: Path, processor: Any, image_token: int) -> None:
    tokenizer: Any = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(processor, "image_processor", None) is None:
        raise Mute(
            "the compiled model has no processor of pictures and text with a tokenizer of the tokenizers package"
        )
    if getattr(processor, "chat_template", None) is None:
        raise Mute("the processor has no chat template")
    if "strftime_now" in str(processor.chat_template):
        raise Mute("the chat template reads the clock")
    if tokenizer.clean_up_tokenization_spaces:
        raise Mute("the tokenizer changes the spaces of its answers (clean_up_tokenization_spaces)")
    processor = _on_pillow(processor)
    rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    _dump(folder / TOKENIZER, rules)
    placeholder = tokenizer.convert_ids_to_tokens(image_token)
    pieces = split_template(lambda turns: _rendered(processor, turns), placeholder)
    _dump(folder / PICTURES, picture_settings(processor, image_token))
    pad = tokenizer.pad_token_id
    pieces = replace(
        pieces,
        special=not (tokenizer.bos_token and pieces.first.open.startswith(tokenizer.bos_token)),
        pad=0 if pad is None else pad,
        control=tuple(sorted(control_tokens(processor))),
        reserved=tuple(placeholders(processor)),
    )
    _dump(folder / CHAT, asdict(pieces))
    _compare(Chat(folder, image_token), processor)


def _on_pillow(processor: Any) -> Any:
    """The processor with its picture part on Pillow: the one that the runner computes as."""
    pictures = processor.image_processor
    if isinstance(pictures, PilBackend):
        return processor
    settings = {name: value for name, value in pictures.to_dict().items() if name != "image_processor_type"}
    twin = getattr(transformers, f"{type(pictures).__name__}Pil", None)
    if twin is None:
        raise Mute(f"{type(pictures).__name__} has no form that computes in Pillow")
    processor = copy.copy(processor)
    processor.image_processor = twin(**settings)
    return processor


def picture_settings(processor: Any, image_token: int) -> dict[str, Any]:
    """`pictures.json` of a processor. Raises Mute for one of another kind than the runner computes."""
    pictures = processor.image_processor
    kind = type(pictures)
    patches = isinstance(pictures, Qwen2VLImageProcessorPil)
    known = (PilBackend, LlavaImageProcessorPil, Qwen2VLImageProcessorPil)
    own = [name for name in ("_preprocess", "resize", "rescale", "normalize", "center_crop", "process_image")
           if not any(getattr(kind, name) is getattr(each, name) for each in known)]  # fmt: skip
    if own:
        raise Mute(f"{kind.__name__} computes {', '.join(own)} in its own way")
    size = dict(pictures.size) if pictures.do_resize and pictures.size else {}
    size = {name: value for name, value in size.items() if value is not None}
    sides = [("shortest_edge", "longest_edge")] if patches else [("height", "width"), ("shortest_edge",), ()]
    order = next((names for names in sides if set(names) == set(size)), None)
    if order is None:
        raise Mute(f"{kind.__name__} resizes to {size or 'nothing'}")
    shared: dict[str, Any] = {
        "kind": PATCHES_KIND if patches else FIXED,
        "resample": int(pictures.resample) if pictures.resample is not None else int(Image.Resampling.BILINEAR),
        "size": [int(size[name]) for name in order] or None,
        "rescale": pictures.rescale_factor if pictures.do_rescale else None,
        "mean": _three(pictures.image_mean) if pictures.do_normalize else None,
        "std": _three(pictures.image_std) if pictures.do_normalize else None,
    }
    if patches:
        return shared | {
            "patch": pictures.patch_size,
            "merge": pictures.merge_size,
            "frames": pictures.temporal_patch_size,
        }
    padded = getattr(pictures, "do_pad", None)
    if padded and not isinstance(pictures, LlavaImageProcessorPil):
        raise Mute(f"{kind.__name__} pads pictures after it resized them")
    colour = [int(255 * value) for value in _three(pictures.image_mean)] if padded else None
    crop = dict(pictures.crop_size) if pictures.do_center_crop else {}
    ids = _made(processor, [Turn((_picture((30, 30)),), QUESTIONS[0])])["input_ids"]
    return shared | {
        "pad": colour,
        "crop": [crop["height"], crop["width"]] if crop else None,
        "tokens": int((ids == image_token).sum()),
    }


def _three(value: Any) -> list[float]:
    return [float(each) for each in (value if isinstance(value, (list, tuple)) else [value] * 3)]


def split_template(render: Render, placeholder: str) -> Pieces:
    """The pieces of a chat template; render: the text of a chat as the template writes it.

    Raises Mute if the template does not write every chat of these pieces.
    """
    first, tails = _ask(lambda count: _parted(render([_turn(count)]), QUESTIONS[:1]), placeholder)
    words = [QUESTIONS[0], ANSWERS[0], QUESTIONS[1]]
    before = Turn((), QUESTIONS[0], ANSWERS[0])
    middles = {count: _parted(render([before, _turn(count, 1)]), words) for count in range(3)}
    later, ends = _ask(lambda count: (middles[count][2], middles[count][3]), placeholder)
    answers = {parts[1] for parts in middles.values()}
    if len(answers) != 1 or len(tails | ends) != 1:
        raise Mute("the chat template writes other text after a question when there are pictures or more turns")
    pieces = Pieces(placeholder, first, later, answers.pop(), tails.pop(), True, False, 0, (), ())
    spaced = [Turn((), f" \n{QUESTIONS[0]} \n", f" {ANSWERS[0]}\n"), Turn((), f"\t{QUESTIONS[1]} ")]
    pieces = replace(pieces, strip=render(spaced) != pieces.prompt(spaced))
    for chat in (spaced, *_chats()):
        if render(chat) != pieces.prompt(chat):
            raise Mute("the chat template is not pictures, question, answer in turn: what it writes depends on more")
    return pieces


def _ask(heads: Callable[[int], Sequence[str]], placeholder: str) -> tuple[Ask, set[str]]:
    """The pieces before a question, and what follows it; heads: the text before and after it by number of pictures."""
    (none, *_), (one, *_), (two, *_) = found = [heads(count) for count in range(3)]
    length = len(one) - len(none)
    for at in range(len(none) + 1):
        image = one[at : at + length]
        left, right = none[:at], none[at:]
        if left + image + right == one and left + image * 2 + right == two and image.count(placeholder) == 1:
            return Ask(left, image, right), {parts[-1] for parts in found}
    raise Mute("the chat template does not write each picture in the same way before the question")


def _parted(text: str, words: Sequence[str]) -> list[str]:
    """The text between the words, each of which is there once."""
    parts: list[str] = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise Mute(f"the chat template does not write the text {word!r} once, as it is")
        parts.append(before)
    return [*parts, text]


def _turn(pictures: int, number: int = 0) -> Turn:
    """Question `number` of the probes, without an answer."""
    return Turn(tuple(_picture(shape) for shape in _SHAPES[:pictures]), QUESTIONS[number])


def _chats() -> list[list[Turn]]:
    """Chats of several forms: pictures in any turn, up to three turns."""
    one, two = (_picture(_SHAPES[0]),), tuple(map(_picture, _SHAPES[1:3]))
    return [
        [Turn((), QUESTIONS[0])],
        [Turn(one, QUESTIONS[0])],
        [Turn(two, QUESTIONS[0])],
        [Turn(one, QUESTIONS[0], ANSWERS[0]), Turn((), QUESTIONS[1])],
        [Turn((), QUESTIONS[0], ANSWERS[0]), Turn(two, QUESTIONS[1])],
        [Turn(one, QUESTIONS[0], ANSWERS[0]), Turn(one, QUESTIONS[1], ANSWERS[1]), Turn((), QUESTIONS[2])],
    ]


def _picture(shape: tuple[int, int]) -> Image.Image:
    """A picture of noise; shape: height and width."""
    values = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), np.uint8)
    return Image.fromarray(values)


def _conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A chat as transformers' templates take it."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in turn.pictures]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def _rendered(processor: Any, turns: Sequence[Turn]) -> str:
    try:
        return processor.apply_chat_template(_conversation(turns), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise arbitrary exceptions
        raise Mute(f"the chat template refuses a chat of {len(turns)} turns: {str(error)[:200]}") from error


def _made(processor: Any, turns: Sequence[Turn]) -> dict[str, Any]:
    """What the processor makes of a chat, as arrays."""
    try:
        made = processor.apply_chat_template(
            _conversation(turns), tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
        )
    except Exception as error:  # processors raise arbitrary exceptions
        raise Mute(f"the processor refuses a chat of {len(turns)} turns: {str(error)[:200]}") from error
    return {name: np.asarray(value) for name, value in made.items()}


def _compare(chat: Chat, processor: Any) -> None:
    """Raise Mute unless the runner makes of every probe what the processor makes of it."""
    for turns in (*_chats(), [Turn((_picture(_SHAPES[3]),), "What is it? Say 1, 2 or more: e.g. Ärger, 猫.")]):
        wanted, found = _made(processor, turns), chat.inputs([turns])
        for name in _SAID_BY_IDS:
            wanted.pop(name, None)
        if different := set(wanted) ^ set(found):
            raise Mute(f"the processor and the runner make different inputs: {', '.join(sorted(different))}")
        for name, value in wanted.items():
            if value.shape != found[name].shape or not np.array_equal(value, found[name]):
                raise Mute(f"the runner does not make the processor's {name} of a chat of {len(turns)} turns")


def _dump(path: Path, content: Any) -> None:
    path.write_text(
        json.dumps(content, ensure_ascii=False, indent=1 if path.name != TOKENIZER else None) + "\n", "utf-8"
    )
