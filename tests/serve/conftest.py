"""A server on a free port, with a trained model in full precision or with one that only counts."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image
from serve.counting import CountingModel, CountingProcessor

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.serve.application import Limits, create_app

BEDS = Path(__file__).resolve().parents[1] / "testbed"
Start = Callable[..., str]


@contextmanager
def served(model: Any, processor: Any, limits: Limits) -> Iterator[str]:
    """The address of a server that stops at the end of the block."""
    app = create_app(model, processor, "out", limits)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model() -> CompiledVLM:
    """A testbed, nothing quantized, nothing cut."""
    return qpcompile.compile(BEDS / "llava", "none", calibration=BEDS / "calibration" / "llava")


@pytest.fixture(scope="session")
def address(model: CompiledVLM) -> Iterator[str]:
    """A server with that model."""
    with served(model, model.processor, Limits(most_tokens=16, most_bytes=2_000_000)) as url:
        yield url


@pytest.fixture
def counting() -> SimpleNamespace:
    """A model that counts, slowly, and its processor; `model.steps` has each step's number of rows."""
    return SimpleNamespace(model=CountingModel(), processor=CountingProcessor())


@pytest.fixture
def start() -> Iterator[Callable[[SimpleNamespace, Limits], str]]:
    """Starts servers, which stop at the end of the test."""
    stack = []

    def begin(parts: SimpleNamespace, limits: Limits) -> str:
        block = served(parts.model, parts.processor, limits)
        stack.append(block)
        return block.__enter__()

    yield begin
    for block in stack:
        block.__exit__(None, None, None)


def as_uri(path: Path) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def text_of(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> str:
    """The greedy answer of a model by itself."""
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return model.processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
