"""Chat completions as OpenAI's clients send them, checked, and as conversations and settings.

A key that a compiled model cannot honour is refused, never ignored.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qpcompile.capture.chat import Conversation
from qpcompile.errors import InputError
from qpcompile.picture import read_picture_bytes

MOST_MESSAGES, MOST_PARTS, MOST_STOPS = 256, 64, 4
LONGEST_TEXT = 1_000_000
_DATA, _BASE64 = "data:image/", ";base64,"
Fetch = Callable[[str], bytes]
"""Gets the bytes of a picture's URL."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str = Field(max_length=LONGEST_TEXT)


class ImageUrl(_Strict):
    """A picture: a data URI, or a URL where the server allows them. `detail` has one value: pictures are not scaled."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS)]


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str = Field(max_length=1000)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: Literal[1] = 1
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1000, description="A name of the caller's own; not stored.")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to stream: true")
        return self


@dataclass(frozen=True)
class Settings:
    """How an answer is generated. temperature 0 is greedy."""

    max_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]
    seed: int | None

    def mixes_with(self, other: Settings) -> bool:
        """Whether both answers can be generated in one batch: a seed gives the same answer only alone."""
        if self.temperature == 0 or other.temperature == 0:
            return self.temperature == other.temperature
        same = (self.temperature, self.top_p) == (other.temperature, other.top_p)
        return same and self.seed is None and other.seed is None


def settings_of(request: ChatRequest, most_tokens: int) -> Settings:
    """The settings of a request. Raises InputError if it asks for more tokens than the server gives."""
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > most_tokens:
        raise InputError(
            f"{asked} tokens are asked for, this server gives at most {most_tokens}",
            where="max_completion_tokens",
            do="ask for fewer, or start the server with a larger --max-tokens",
        )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    stops = tuple(text for text in stop if text)
    return Settings(asked or most_tokens, request.temperature, request.top_p, stops, request.seed)


def conversation_of(request: ChatRequest, fetch: Fetch | None) -> Conversation:
    """The conversation with decoded pictures.

    Args:
        request: the checked request.
        fetch: gets the bytes of a URL; None refuses URLs.

    Raises InputError for a URL that is refused or not a picture's, CalibrationError for a picture that cannot be read.
    """
    made: Conversation = []
    for number, message in enumerate(request.messages):
        role = "system" if message.role == "developer" else message.role
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        content: list[dict[str, Any]] = []
        for place, part in enumerate(parts):
            where = f"messages[{number}].content[{place}]"
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            else:
                content.append({"type": "image", "image": _picture(part.image_url.url, where, fetch)})
        made.append({"role": role, "content": content})
    return made


def failure_body(told: str, status: int) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it. status: of HTTP."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": told, "type": kind, "param": None, "code": None}}


def _picture(url: str, where: str, fetch: Fetch | None) -> Image.Image:
    if not url.startswith(_DATA):
        if fetch is None or not url.startswith(("http://", "https://")):
            raise InputError(
                f"a picture is given as {url[:60]!r}",
                where=where,
                do="send it as a data URI, data:image/png;base64,... (URLs: start the server with --allow-urls)",
            )
        return read_picture_bytes(fetch(url), where=where)
    head, found, text = url.partition(_BASE64)
    try:
        if not found:
            raise ValueError("it is not base64")
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"the data URI {head[:60]!r} cannot be decoded: {error}", where=where) from error
    return read_picture_bytes(data, where=where)
