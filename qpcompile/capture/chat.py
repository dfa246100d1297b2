"""Convert conversations to model inputs, always through the processor's own `apply_chat_template`.

    apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)

It handles whether the template already contains the BOS token, and how this processor takes the pictures of several
texts. Rows of a batch are left-padded, so that every answer starts where its prompt ends.

User input is text. Tokenizers convert the name of a special token inside it to that token, which would end the user's
turn or refer to a missing picture; such text is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qpcompile.errors import ArtifactError, CalibrationError
from qpcompile.special_tokens import control_tokens, placeholders

# A list of messages as `apply_chat_template` takes it: {"role": ..., "content": [parts]}.
Conversation = list[dict[str, Any]]


def about_picture(picture: Image.Image | None, question: str) -> Conversation:
    """The conversation of one question about one picture, or about none."""
    shown = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def need_processor(processor: Any, source: str | Path) -> Any:
    """The processor, or an error that explains how a compiled model gets one."""
    if processor is None:
        raise ArtifactError(
            "the compiled model has no processor, so pictures and questions cannot be turned into inputs",
            where=str(source),
            do="compile with processor=..., or from the folder of a model that has one",
        )
    return processor


def chat_inputs(processor: Any, conversations: Sequence[Conversation], places: Sequence[str]) -> dict[str, Any]:
    """Model inputs as `model.generate` takes them, one row per conversation: input_ids i64[B, S], pixel_values, ...

    Args:
        processor: a transformers processor with a chat template.
        conversations: one or more; a picture part has its Pillow image under "image".
        places: how errors refer to each conversation: a picture, a line of a file.

    Raises CalibrationError if there is no template, if a text contains a special token, and if template or processor
    fail.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CalibrationError(
            "the processor has no chat template, so a question cannot be turned into a prompt",
            where=f"{places[0]}: {type(processor).__name__}",
            do="give the processor its model's template (processor.chat_template = ...), or calibrate on samples that "
            "are model inputs instead of a folder",
        )
    for conversation, place in zip(conversations, places, strict=True):
        check_texts(processor, texts(conversation), place)
    try:
        return _applied(processor, conversations)
    except Exception as error:  # noqa: BLE001 templates and processors raise arbitrary exceptions
        place, cause = _culprit(processor, conversations, places, error)
        raise CalibrationError(
            f"the processor makes no model inputs of this: {type(cause).__name__}: {_said(cause)}",
            where=place,
            do=f"check the picture, the text and the chat template of this {type(processor).__name__}",
        ) from cause


def texts(conversation: Conversation) -> list[str]:
    """All texts of a conversation."""
    contents = [message.get("content") or [] for message in conversation]
    parts = [[content] if isinstance(content, str) else [part.get("text") for part in content] for content in contents]
    return [text for found in parts for text in found if isinstance(text, str)]


def check_texts(processor: Any, found: Iterable[str], place: str) -> None:
    """Refuse text that the tokenizer or the processor would parse as special tokens."""
    names = placeholders(processor)
    control = control_tokens(processor)
    for text in found:
        inside = [name for name in names if name in text]
        if control and not inside:
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            inside = [control[token] for token in ids if token in control]
        if inside:
            raise CalibrationError(
                f"the text holds {inside[0]!r}, which is a token of the model and not text: {text[:200]!r}",
                where=place,
                do="write it in another way: with spaces in it, or in words",
            )


def _applied(processor: Any, conversations: Sequence[Conversation]) -> dict[str, Any]:
    # A single row needs no padding token, which some tokenizers lack.
    padding = {"padding": True, "padding_side": "left"} if len(conversations) > 1 else {}
    return dict(
        processor.apply_chat_template(
            list(conversations),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=padding,
        )
    )


def _culprit(
    processor: Any, conversations: Sequence[Conversation], places: Sequence[str], error: Exception
) -> tuple[str, Exception]:
    """(place, error) of the first conversation that fails alone; of all of them if only the batch fails."""
    if len(conversations) == 1:
        return places[0], error
    for conversation, place in zip(conversations, places, strict=True):
        try:
            _applied(processor, [conversation])
        except Exception as alone:  # noqa: BLE001 as above
            return place, alone
    return f"{places[0]} to {places[-1]}, together", error


def _said(error: Exception) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split())[:300] or "no message"
