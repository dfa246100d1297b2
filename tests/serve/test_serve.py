"""`qpcompile serve` with OpenAI's own client: answers, many clients, hang-ups, long requests, refusals."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from serve.conftest import BEDS, as_uri, text_of

from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.compiled import CompiledVLM
from qpcompile.serve.application import Limits

QUESTIONS = read_questions(BEDS / "calibration" / "llava")[:32]
Start = Callable[[SimpleNamespace, Limits], str]


def client(address: str, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60, **settings)


def about(number: int) -> list[Any]:
    """The messages of one question about its picture."""
    question = QUESTIONS[number]
    picture = {"type": "image_url", "image_url": {"url": as_uri(question.picture)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.question}]}]


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def get(address: str, path: str) -> str:
    """The body of a plain GET."""
    return client(address).get(
        path.replace("/v1", "", 1) if path.startswith("/v1") else f"{address}{path}", cast_to=str
    )


def test_an_answer_is_the_models_own(model: CompiledVLM, address: str) -> None:
    inputs = question_inputs(model.processor, [QUESTIONS[0]])
    expected = text_of(model, inputs, 8)
    asked: dict[str, Any] = {"model": "out", "messages": about(0), "max_completion_tokens": 8}
    whole = client(address).chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.prompt_tokens == inputs["input_ids"].shape[1]
    stream = client(address).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == expected and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert [each.id for each in client(address).models.list()] == ["out"]


def test_many_clients_at_once_get_their_own_answers(model: CompiledVLM, address: str) -> None:
    expected = [text_of(model, question_inputs(model.processor, [question]), 8) for question in QUESTIONS]

    def ask(number: int) -> str:
        found = client(address).chat.completions.create(model="out", messages=about(number), max_completion_tokens=8)
        return found.choices[0].message.content or ""

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == expected
    lines = dict(line.rsplit(" ", 1) for line in get(address, "/metrics").splitlines() if not line.startswith("#"))
    batches = float(lines["qpcompile_batch_rows_count"])
    assert batches < float(lines["qpcompile_batch_rows_sum"]), "nothing was answered together"
    assert float(lines["qpcompile_waiting_requests"]) == 0


REFUSED = {
    "another model": ({"model": "gpt"}, "there is no model 'gpt'"),
    "a key that is not honoured": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: Extra inputs"),
    "two answers": ({"n": 2}, "n: Input should be 1"),
    "more tokens than the server gives": ({"max_completion_tokens": 17}, "17 tokens are asked for"),
    "two limits": ({"max_completion_tokens": 2, "max_tokens": 2}, "give one of them"),
    "a negative temperature": ({"temperature": -1}, "temperature: Input should be greater"),
    "no messages": ({"messages": []}, "messages: List should have at least 1"),
    "a special token in text": ({"messages": say("<image>")}, "which is a token of the model and not text"),
}
PICTURES = {
    "a URL": ("https://example.org/x.png", "start the server with --allow-urls"),
    "a file": ("file:///etc/passwd", "send it as a data URI"),
    "not base64": ("data:image/png;base64,%%%", "cannot be decoded"),
    "not a picture": ("data:image/png;base64,aGVsbG8=", "is not a picture that can be read"),
    "nothing": ("data:image/png;base64,", "has no bytes"),
}


@pytest.mark.parametrize(("given", "told"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(address: str, given: dict[str, Any], told: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=told):
            asked: dict[str, Any] = {"model": "out", "messages": say("what is this?"), **given}
            client(address).chat.completions.create(**asked, stream=stream)


@pytest.mark.parametrize(("url", "told"), PICTURES.values(), ids=list(PICTURES))
def test_pictures_that_are_refused(address: str, url: str, told: str) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(openai.BadRequestError, match=told):
        client(address).chat.completions.create(model="out", messages=messages)


def test_a_request_of_100_mb_is_refused_before_it_is_read(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for framing in (f"Content-Length: {100_000_000}", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(f"{head}{framing}\r\n\r\n".encode())
            part = b"1" * 65536
            try:
                for _ in range(100_000_000 // len(part)):
                    connection.sendall(part if "Length" in framing else b"10000\r\n" + part + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server answered, and closed the connection
            else:
                assert b" 413 " in connection.recv(1000)
    assert get(address, "/health") == '{"status":"ok"}'


def test_a_client_that_hangs_up_frees_its_place(counting: SimpleNamespace, start: Start) -> None:
    address = start(counting, Limits(most_rows=1, most_tokens=100_000))
    stream = client(address).chat.completions.create(model="out", messages=say("a"), stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    whole = client(address).with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        whole.chat.completions.create(model="out", messages=say("a"))
    # Both would have gone on for a quarter of an hour.
    found = client(address).chat.completions.create(model="out", messages=say("b"), max_completion_tokens=3)
    assert found.choices[0].message.content == "cde" and found.choices[0].finish_reason == "length"


def test_a_full_queue_says_so(counting: SimpleNamespace, start: Start) -> None:
    address = start(counting, Limits(most_rows=1, most_waiting=1, most_tokens=1000))
    streams = [client(address).chat.completions.create(model="out", messages=say("a"), stream=True)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            client(address).chat.completions.create, model="out", messages=say("b"), max_completion_tokens=1
        )
        while "qpcompile_waiting_requests 1.0" not in get(address, "/metrics"):
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
            client(address).chat.completions.create(model="out", messages=say("c"))
        streams[0].close()
        assert waiting.result().choices[0].message.content == "c"


def test_stop_strings_and_ends(counting: SimpleNamespace, start: Start) -> None:
    address = start(counting, Limits(most_tokens=26))
    create = client(address).chat.completions.create
    for stops, expected, reason in (
        (["fg"], "bcde", "stop"),
        ("zz", "bcdefghijk", "length"),
        (["x", "d"], "bc", "stop"),
    ):
        asked: dict[str, Any] = {"model": "out", "messages": say("a"), "max_completion_tokens": 10, "stop": stops}
        whole = create(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (expected, reason)
        chunks = [chunk.choices[0] for chunk in create(**asked, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].finish_reason == reason
    ended = create(model="out", messages=say("e")).choices[0]
    assert (ended.message.content, ended.finish_reason) == ("", "stop")


def test_one_bad_request_does_not_spoil_its_batch(counting: SimpleNamespace, start: Start) -> None:
    address = start(counting, Limits(most_rows=8))
    busy = client(address).chat.completions.create(model="out", messages=say("a"), stream=True)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(
                client(address).chat.completions.create, model="out", messages=say(text), max_completion_tokens=2
            )
            for text in ("b", "d", "why?", "f")
        ]
        while "qpcompile_waiting_requests 4.0" not in get(address, "/metrics"):
            time.sleep(0.01)
        busy.close()
        texts = [each.result().choices[0].message.content for each in (asked[0], asked[1], asked[3])]
        with pytest.raises(openai.BadRequestError, match="a question mark"):
            asked[2].result()
    assert texts == ["cd", "ef", "gh"]


def test_seeds_are_answered_alone(counting: SimpleNamespace, start: Start) -> None:
    address = start(counting, Limits(most_rows=8))
    create = client(address).chat.completions.create
    for seed in (5, 6):
        create(model="out", messages=say("a"), max_completion_tokens=2, temperature=0.5, seed=seed)
    assert counting.model.seeds == [5, 6] and set(counting.model.steps) == {1}
