"""`qpcompile chat`: a conversation on the terminal; `qpcompile serve`: the same over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from qpcompile.capture.chat import Conversation, chat_inputs
from qpcompile.picture import read_picture
from qpcompile.cli.models import load_artifact, need_processor
from qpcompile.cli.terminal import note
from qpcompile.errors import CalibrationError, InputError

HELP = "/image FILE adds a picture to your next message, /new begins again, /quit or Ctrl-D ends"


def chat(artifact: Path, images: Sequence[Path], max_new_tokens: int) -> None:
    """Read messages from stdin, line by line, and stream the answers to stdout."""
    first = [{"type": "image", "image": read_picture(image, where="--image")} for image in images]
    compiled = load_artifact(artifact)
    processor = need_processor(compiled.processor, artifact)
    from transformers import TextStreamer

    note(HELP)
    conversation: Conversation = []
    pictures: list[dict[str, Any]] = first
    for line in _lines():
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/new":
                conversation, pictures = [], []
            elif word == "/image":
                pictures = [*pictures, {"type": "image", "image": read_picture(rest.strip(), where="/image")}]
            elif word.startswith("/"):
                note(HELP)
            else:
                asked = [*conversation, {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}]
                inputs = chat_inputs(processor, [asked], ["this message"])
                streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                tokens = compiled.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
                new = tokens[:, inputs["input_ids"].shape[1] :]
                answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
                said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
                conversation, pictures = [*asked, said], []
        except (CalibrationError, InputError) as error:
            # One message is refused, the conversation goes on.
            note(str(error))


def _lines() -> Iterator[str]:
    """Lines that are not empty; with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def serve(artifact: Path, host: str, port: int, device: str | None, **limits: Any) -> None:
    """Load the model, and answer until a signal comes."""
    try:
        import uvicorn

        from qpcompile.serve.app import Limits, create_app
    except ModuleNotFoundError as error:
        raise InputError(
            f"the package {error.name} is not installed",
            where="qpcompile serve",
            do='install the extra: pip install "qpcompile[serve]"',
        ) from error
    compiled = load_artifact(artifact)
    processor = need_processor(compiled.processor, artifact)
    if device is not None:
        compiled.to(device)
    app = create_app(compiled, processor, artifact.resolve().name, Limits(**limits))
    uvicorn.run(app, host=host, port=port, log_level="info")
