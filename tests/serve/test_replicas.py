"""Replicas on Ray Serve: their settings, what is told of a lost one; and two of them, one killed under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from serve.conftest import as_uri, text_of

from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import InputError
from qpcompile.serve.replicas import LOST, LostReplica, ReplicaSettings

BEDS = Path(__file__).resolve().parents[1] / "testbed"
QUESTION = read_questions(BEDS / "calibration" / "llava")[0]
TOKENS = 8


def test_arguments_of_a_command_line() -> None:
    found = ReplicaSettings.of({"folder": "out", "replicas": "2", "allow_urls": "true", "memory_gib": "1.5"})
    assert (found.replicas, found.allow_urls, found.memory_gib, found.max_batch) == (2, True, 1.5, 8)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "folder: Field required"),
        ({"folder": "out", "replicas": "0"}, "replicas: Input should be greater than or equal to 1"),
        ({"folder": "out", "memory_gib": "inf"}, "memory_gib: Input should be a finite number"),
        ({"folder": "out", "replica": "2"}, "replica: Extra inputs are not permitted"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, str], told: str) -> None:
    with pytest.raises(InputError) as caught:
        ReplicaSettings.of(arguments)
    assert told in caught.value.what and "max_batch" in str(caught.value.do)


class _Proxy:
    """Answers as Ray Serve's proxy does when a replica is lost before, or while, it answers."""

    def __init__(self, sent: list[dict[str, Any]]) -> None:
        self.sent = sent

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for message in self.sent:
            await send(message)


def head(kind: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def body(text: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def test_a_lost_answer_is_an_error_that_openai_clients_read() -> None:
    found = TestClient(LostReplica(_Proxy([]))).post("/v1/chat/completions")
    assert found.status_code == 502 and found.headers["retry-after"] == "1"
    assert found.json()["error"] == {"message": LOST, "type": "server_error", "param": None, "code": None}


def test_a_cut_stream_ends_with_an_error() -> None:
    sent = [head("text/event-stream; charset=utf-8"), body(b"data: 1\n\n", True)]
    *first, last, rest = TestClient(LostReplica(_Proxy(sent))).get("/").text.split("\n\n")
    assert first == ["data: 1"] and rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == LOST


def test_whole_answers_are_left_alone() -> None:
    app = FastAPI()

    @app.get("/whole")
    async def whole() -> dict[str, int]:
        return {"a": 1}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["data: 1\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream")

    plain, watched = TestClient(app), TestClient(LostReplica(app))
    for path in ("/whole", "/stream", "/missing"):
        assert watched.get(path).text == plain.get(path).text
        assert watched.get(path).status_code == plain.get(path).status_code


def test_what_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from qpcompile.serve import app
    from qpcompile.serve.replicas import PROXY_HOOK

    for name in ("RAY_USAGE_STATS_ENABLED", PROXY_HOOK):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    found = app({"folder": "out", "replicas": "2", "max_batch": "4", "device": "cuda", "memory_gib": "2"})
    deployment = found._bound_deployment
    assert deployment.num_replicas == 2 and deployment.max_ongoing_requests == 8
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"], options["memory"]) == (1, 1, 2 * 2**30)
    assert deployment.init_args[0].folder == str(tmp_path / "out")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and "proxy_middlewares" in os.environ[PROXY_HOOK]


@pytest.fixture(scope="module")
def replicas(model: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas on a Ray of this machine."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray import serve

    from qpcompile.serve import app

    folder = tmp_path_factory.mktemp("served") / "out"
    model.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = app({"folder": str(folder), "replicas": 2, "max_tokens": TOKENS})
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(made, name="qpcompile", blocking=False)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def processes() -> list[psutil.Process]:
    """The replicas' processes that answer."""
    found = []
    for each in psutil.Process().children(recursive=True):
        # Any of them may end meanwhile.
        with suppress(psutil.Error):
            title = " ".join(each.cmdline())
            if "ray::ServeReplica:" in title and "initialize" not in title:
                found.append(each)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_is_killed_loses_only_what_it_had(replicas: str, model: CompiledVLM, stream: bool) -> None:
    clients, each = 8, 12
    picture = {"type": "image_url", "image_url": {"url": as_uri(QUESTION.picture)}}
    messages: Any = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION.question}]}]
    expected = text_of(model, question_inputs(model.processor, [QUESTION]), TOKENS)
    asked = {"model": "out", "messages": messages, "max_completion_tokens": TOKENS}
    begun = time.monotonic()
    while len(processes()) < 2:
        assert time.monotonic() - begun < 300
        time.sleep(1)
    killed = threading.Event()

    def ask(number: int) -> list[str]:
        client = openai.OpenAI(base_url=f"{replicas}/v1", api_key="none", max_retries=0, timeout=300)
        found = []
        for turn in range(each):
            if number == 0 and turn == each // 3:
                processes()[0].send_signal(signal.SIGKILL)
                killed.set()
            try:
                if stream:
                    chunks = list(client.chat.completions.create(**asked, stream=True))
                    assert chunks[-1].choices[0].finish_reason is not None
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
                else:
                    text = client.chat.completions.create(**asked).choices[0].message.content
                found.append("answered" if text == expected else f"wrong: {text}")
            except openai.APIError as error:
                found.append("told" if LOST in str(error) else f"unclear: {error}")
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = Counter(word for words in pool.map(ask, range(clients)) for word in words)
    assert killed.is_set() and set(found) <= {"answered", "told"}, found
    # One client at a time has one request in one of the two replicas.
    assert found["told"] < clients and found.total() == clients * each
