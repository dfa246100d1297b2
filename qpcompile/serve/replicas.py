"""Several replicas of one compiled model on Ray Serve. Needs the extras `ray` and `serve`.

    serve run qpcompile.serve:app folder=out/ replicas=2

Each replica is the application of `qpcompile serve`: one model, one queue, one thread that generates. Ray Serve spreads
requests over them, holds back what they do not take, and starts a lost replica again. What was in a lost replica gets
an error from LostReplica, which runs in Ray Serve's proxies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpcompile.errors import InputError

GIB = 2**30
# Where Ray Serve's proxies look for middleware of an application.
PROXY_HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LOST = "the replica that had this request was lost; nothing of it is kept, ask again"


class ReplicaSettings(BaseModel):
    """The arguments of `app`; those with the name of an option of `qpcompile serve` mean the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    folder: str = Field(min_length=1, description="Compiled folder, at the same path on every machine.")
    replicas: int = Field(default=1, ge=1, description="Copies of the model.")
    cpus: int = Field(default=1, ge=1, description="Cores and threads of a replica.")
    memory_gib: float | None = Field(default=None, gt=0, description="Memory that a replica is placed by.")
    device: str | None = Field(default=None, description="Where to compute; cuda takes one GPU per replica.")
    max_batch: int = Field(default=8, ge=1, description="Requests answered together in a replica.")
    max_queue: int = Field(default=64, ge=1, description="Requests that wait in a proxy; more get status 429.")
    max_tokens: int = Field(default=1024, ge=1, description="Longest answer, in tokens.")
    max_bytes: int = Field(default=32_000_000, ge=1, description="Longest request, pictures included.")
    allow_urls: bool = Field(default=False, description="Fetch pictures from URLs in requests.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> ReplicaSettings:
        """The settings in the arguments of `serve run`. Raises InputError naming each that cannot be used."""
        try:
            return cls.model_validate(dict(arguments))
        except ValidationError as error:
            told = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            raise InputError(
                "; ".join(told),
                where="arguments of qpcompile.serve:app",
                do=f"give KEY=VALUE with keys from {', '.join(cls.model_fields)}",
            ) from error


class Replica:
    """One model and its application, in a process of its own."""

    def __init__(self, settings: ReplicaSettings) -> None:
        import torch

        from qpcompile.capture.chat import need_processor
        from qpcompile.compiled import load

        self._settings = settings
        torch.set_num_threads(settings.cpus)
        self._model = load(settings.folder)
        self._processor = need_processor(self._model.processor, settings.folder)
        if settings.device is not None:
            self._model.to(settings.device)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve, in the loop that answers requests."""
        from qpcompile.serve.application import Limits, create_app

        asked = self._settings
        # The queue is Ray Serve's; here waits at most the next batch.
        limits = Limits(asked.max_batch, _taken(asked), asked.max_tokens, asked.max_bytes, asked.allow_urls)
        self._app = create_app(self._model, self._processor, Path(asked.folder).name, limits)
        return self._app

    def check_health(self) -> None:
        """Called by Ray Serve, which starts a replica again where this raises."""
        if not self._app.state.engine.alive:
            raise RuntimeError("the thread that generates has ended")


def app(arguments: dict[str, Any]) -> Any:
    """The application for `serve run qpcompile.serve:app KEY=VALUE ...`, and for Ray Serve's configuration files.

    Args:
        arguments: see ReplicaSettings.
    """
    from ray import serve

    settings = ReplicaSettings.of(arguments)
    if Path(settings.folder).is_dir():
        settings = settings.model_copy(update={"folder": str(Path(settings.folder).resolve())})
    # Inherited by a Ray that `serve run` starts after this; one that runs already has what it was started with.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[PROXY_HOOK] = "qpcompile.serve.replicas.proxy_middlewares"
    resources: dict[str, Any] = {"num_cpus": settings.cpus}
    if settings.device is not None and settings.device.startswith("cuda"):
        resources["num_gpus"] = 1
    if settings.memory_gib is not None:
        resources["memory"] = int(settings.memory_gib * GIB)
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="qpcompile",
        num_replicas=settings.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=_taken(settings),
        max_queued_requests=settings.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
    )
    return deployment.bind(settings)


def _taken(settings: ReplicaSettings) -> int:
    """Requests in a replica: a batch that is answered and the next. More would be lost with it, fewer leave it idle."""
    return 2 * settings.max_batch


def proxy_middlewares() -> list[Any]:
    """What Ray Serve's proxies run around every request."""
    from starlette.middleware import Middleware

    return [Middleware(LostReplica)]


class LostReplica:
    """Ends answers that their replica cannot end: Ray Serve sends an empty status 500, or cuts a stream.

    An answer that has not begun gets status 502. One that streams events gets a last event with the error.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = ended = streams = False

        async def watched(message: Any) -> None:
            nonlocal began, ended, streams
            if message["type"] == "http.response.start":
                began = True
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if not began:
            await self._refuse(scope, receive, send)
        elif streams and not ended:
            event = f"data: {json.dumps(_body())}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        await JSONResponse(_body(), 502, {"Retry-After": "1"})(scope, receive, send)


def _body() -> dict[str, Any]:
    from qpcompile.serve.requests import failure_body

    return failure_body(LOST, 502)
