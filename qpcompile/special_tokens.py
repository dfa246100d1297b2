"""Tokens that ordinary text must not name: control tokens of a chat, and placeholders of pictures.

Tokenizers convert the name of a special token inside user text to that token, which would end the user's turn or refer
to a missing picture.
"""

from __future__ import annotations

from typing import Any

# Placeholders in text that a processor replaces by the tokens of a picture, a video or audio.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")


def placeholders(processor: Any) -> list[str]:
    """Texts that a processor expands."""
    names = [getattr(processor, name, None) for name in _PLACEHOLDERS]
    return [name for name in names if isinstance(name, str) and name]


def control_tokens(processor: Any) -> dict[int, str]:
    """Id -> name of the tokens forbidden in text: special ones, and bracketed ones that the template writes.

    The token for unknown words is allowed: ordinary text produces it.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    template, unknown = str(processor.chat_template), getattr(tokenizer, "unk_token_id", None)
    return {
        number: token.content
        for number, token in added.items()
        if number != unknown and (token.special or (token.content[:1] in "<[{|" and token.content in template))
    }
