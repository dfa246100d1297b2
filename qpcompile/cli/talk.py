"""`qpcompile chat`: a conversation on the terminal; `qpcompile serve`: the same over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qpcompile.capture.chat import Conversation, chat_inputs, need_processor
from qpcompile.cli.models import load_artifact
from qpcompile.cli.options import ARTIFACT_HELP, Debug, Device
from qpcompile.cli.terminal import note, told_as_text
from qpcompile.errors import CalibrationError, InputError
from qpcompile.picture import read_picture

HELP = "/image FILE adds a picture to your next message, /new begins again, /quit or Ctrl-D ends"


def chat_command(
    artifact: Annotated[Path, typer.Argument(help=ARTIFACT_HELP, show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Picture of the first message; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    debug: Debug = False,
) -> None:
    """Talk about pictures: several turns, answers streamed."""
    with told_as_text(debug):
        _chat(artifact, images or [], max_new_tokens)


def serve_command(
    artifact: Annotated[Path, typer.Argument(help=ARTIFACT_HELP, show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get status 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_bytes: Annotated[int, typer.Option(min=1, help="Longest request, pictures included.")] = 32_000_000,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures from URLs in requests.")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Serve a compiled model over HTTP, as OpenAI's chat completions."""
    limits = {"most_rows": max_batch, "most_waiting": max_queue, "most_tokens": max_tokens, "most_bytes": max_bytes}
    with told_as_text(debug):
        _serve(artifact, host, port, device, **limits, allow_urls=allow_urls)


def _chat(artifact: Path, images: Sequence[Path], max_new_tokens: int) -> None:
    """Read messages from stdin, line by line, and stream the answers to stdout."""
    first = [{"type": "image", "image": read_picture(image, where="--image")} for image in images]
    compiled = load_artifact(artifact)
    processor = need_processor(compiled.processor, artifact)
    from transformers import TextStreamer

    from qpcompile.runtime.model_inputs import new_tokens

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
                answer = processor.batch_decode(new_tokens(inputs, tokens), skip_special_tokens=True)[0].strip()
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


def _serve(artifact: Path, host: str, port: int, device: str | None, **limits: Any) -> None:
    """Load the model, and answer until a signal comes."""
    try:
        import uvicorn

        from qpcompile.serve.application import Limits, create_app
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
