"""OpenAI's chat completions on one compiled model: for `qpcompile serve`, and in each replica (replicas.py).

    POST /v1/chat/completions    with pictures as data URIs, streamed or whole
    GET  /v1/models              the one model
    GET  /health                 200 while requests are taken
    GET  /metrics                for Prometheus

Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qpcompile.errors import CalibrationError, InputError, QPCompileError
from qpcompile.serve.engine import BusyError, Engine, Job, Piece
from qpcompile.serve.fetch import fetch_picture
from qpcompile.serve.requests import ChatRequest, conversation_of, failure_body, settings_of

# Seconds between two looks at whether a client that waits for a whole answer is still there.
LOOK = 0.5


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them, may ask for. most_bytes: of a request's body, and of a fetched picture."""

    most_rows: int = 8
    most_waiting: int = 64
    most_tokens: int = 1024
    most_bytes: int = 32_000_000
    allow_urls: bool = False


class _Metrics:
    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("qpcompile_requests", "Chat completions by status.", ["status"], registry=own)
        self.prompt = Counter("qpcompile_prompt_tokens", "Tokens of prompts, visual ones included.", registry=own)
        self.tokens = Counter("qpcompile_generated_tokens", "Tokens of answers.", registry=own)
        self.waiting = Gauge("qpcompile_waiting_requests", "Requests that are not being answered yet.", registry=own)
        batches = (1, 2, 4, 8, 16, 32)
        self.rows = Histogram("qpcompile_batch_rows", "Requests answered together.", buckets=batches, registry=own)
        self.seconds = Histogram("qpcompile_request_seconds", "From a request to its answer's end.", registry=own)


def create_app(model: Any, processor: Any, name: str, limits: Limits) -> FastAPI:
    """The application. It ends by answering what is queued. Its `state.engine` is the Engine.

    Args:
        model: a compiled model.
        processor: its processor.
        name: what the model is called in answers.
        limits: see Limits.
    """
    metrics = _Metrics()
    engine = Engine(model, processor, limits.most_rows, limits.most_waiting, metrics.rows.observe)
    metrics.waiting.set_function(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="qpcompile", lifespan=lifespan)
    app.state.engine = engine
    app.add_middleware(_LimitedBody, most=limits.most_bytes)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        metrics.requests.labels("400").inc()
        told = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        return failure(400, "; ".join(told))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if engine.alive else JSONResponse({"status": "stopping"}, 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qpcompile"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request, asked: ChatRequest) -> Response:
        started = time.monotonic()
        answer = Answer(name, asked, metrics, started)
        try:
            if asked.model != name:
                raise InputError(f"there is no model {asked.model[:100]!r}", where="model", do=f"ask for {name!r}")
            settings = settings_of(asked, limits.most_tokens)
            fetch = (lambda url: fetch_picture(url, limits.most_bytes)) if limits.allow_urls else None
            # Decoding a picture takes time that other requests need.
            conversation = await asyncio.to_thread(conversation_of, asked, fetch)
            job = Job(conversation, settings, answer.give)
            engine.submit(job)
        except (BusyError, QPCompileError) as error:
            return answer.refused(error)
        if not asked.stream:
            return await answer.whole(request, job)
        # The first piece decides the status: a stream that has begun cannot be refused.
        first = await answer.next(request, job)
        if first is None or first.error is not None:
            return answer.refused(first.error if first else None)
        return StreamingResponse(answer.events(first, request, job), media_type="text/event-stream")

    return app


class Answer:
    """One answer on its way from the engine's thread to a client."""

    def __init__(self, model: str, asked: ChatRequest, metrics: _Metrics, started: float) -> None:
        self._asked, self._metrics, self._started, self._looked = asked, metrics, started, started
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def give(self, piece: Piece) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self, request: Request, job: Job) -> Piece | None:
        """The next piece; None if the client is gone: its row ends with the next token."""
        while True:
            if time.monotonic() - self._looked > LOOK:
                self._looked = time.monotonic()
                if await request.is_disconnected():
                    job.cancelled = True
                    return None
            try:
                return await asyncio.wait_for(self._pieces.get(), LOOK)
            except TimeoutError:
                continue

    def refused(self, error: Exception | None) -> JSONResponse:
        """The response to an error; None: nobody waits for it."""
        status = 499 if error is None else 429 if isinstance(error, BusyError) else 400
        if error is not None and not isinstance(error, (BusyError, InputError, CalibrationError)):
            status = 500
        self._count(status)
        told = "the answer failed; the server's log says why" if status == 500 else str(error)
        return failure(status, told, {"Retry-After": "1"} if status == 429 else None)

    async def whole(self, request: Request, job: Job) -> Response:
        """The answer as one object."""
        text = ""
        while (piece := await self.next(request, job)) is not None:
            if piece.error is not None:
                return self.refused(piece.error)
            text += piece.text
            if piece.last:
                self._count(200, piece)
                message = {"role": "assistant", "content": text.strip(), "refusal": None}
                choice = {"index": 0, "message": message, "finish_reason": piece.reason, "logprobs": None}
                made = {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(piece)}
                return JSONResponse(made)
        return self.refused(None)

    async def events(self, first: Piece, request: Request, job: Job) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        piece: Piece | None = first
        try:
            yield self._event({"role": "assistant", "content": ""}, None)
            while True:
                if piece is None:
                    self._count(499)
                    return
                if piece.error is not None:
                    self._count(500)
                    yield f"data: {json.dumps(failure_body('the answer failed; the server has logged why', 500))}\n\n"
                    return
                if piece.text:
                    yield self._event({"content": piece.text}, None)
                if piece.last:
                    break
                piece = await self.next(request, job)
            yield self._event({}, piece.reason)
            if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
                made = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(piece)}
                yield f"data: {json.dumps(made)}\n\n"
            self._count(200, piece)
            yield "data: [DONE]\n\n"
        finally:
            # Also where the server ends the iteration because the client hung up.
            job.cancelled = True

    def _event(self, delta: dict[str, Any], reason: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps({**self._head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    def _count(self, status: int, piece: Piece | None = None) -> None:
        self._metrics.requests.labels(str(status)).inc()
        self._metrics.seconds.observe(time.monotonic() - self._started)
        if piece is not None:
            self._metrics.prompt.inc(piece.prompt_tokens)
            self._metrics.tokens.inc(piece.tokens)


class _LimitedBody:
    """Refuses a request whose body is longer than `most` bytes; no more than that is read into memory."""

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = failure(413, f"the request is longer than {self._most:,} bytes", {"Connection": "close"})
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._most:
            await refusal(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise ValueError("a body beyond the limit")
            return message

        async def watched(message: Any) -> None:
            # What the application makes of the error above.
            if read <= self._most:
                await send(message)
            elif message["type"] == "http.response.start":
                await refusal(scope, receive, send)

        await self._app(scope, counted, watched)


def failure(status: int, told: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse(failure_body(told, status), status, headers)


def _usage(piece: Piece) -> dict[str, int]:
    total = piece.prompt_tokens + piece.tokens
    return {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.tokens, "total_tokens": total}
