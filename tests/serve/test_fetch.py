"""Pictures from URLs: read whole, and never too much, too long or from elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qpcompile.errors import InputError
from qpcompile.serve import fetch
from qpcompile.serve.fetch import fetch_picture


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/")
        self.send_response(302 if kind == "elsewhere" else 404 if kind == "missing" else 200)
        if kind == "elsewhere":
            self.send_header("Location", "/whole")
        self.end_headers()
        for _ in range(100 if kind == "slow" else 1):
            time.sleep(0.05 if kind == "slow" else 0)
            try:
                self.wfile.write(b"x" * (1 if kind == "slow" else 1000))
            except OSError:
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_whole(site: str) -> None:
    assert fetch_picture(f"{site}/whole", 1000) == b"x" * 1000


@pytest.mark.parametrize(
    ("path", "told"), [("missing", "404"), ("elsewhere", "302"), ("whole", "longer than 999 bytes")]
)
def test_refusals(site: str, path: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        fetch_picture(f"{site}/{path}", 999)


def test_bytes_that_drip_do_not_hold_it(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"did not arrive within 0\.3 s"):
        fetch_picture(f"{site}/slow", 1000)
    assert time.monotonic() - began < 3
