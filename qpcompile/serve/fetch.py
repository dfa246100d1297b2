"""Fetch a picture from a URL, for servers that allow it: bounded in time and size, without redirects."""

from __future__ import annotations

import time
from http.client import HTTPException
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, build_opener

from qpcompile.errors import InputError

SECONDS, PART = 10.0, 65536


class _NoRedirects(HTTPRedirectHandler):
    """A redirect could lead to addresses that only the server reaches."""

    def redirect_request(self, *_: Any) -> None:  # type: ignore[override]
        return None


def fetch_picture(url: str, most_bytes: int) -> bytes:
    """The bytes at an http or https URL. Raises InputError if there are none, or more than `most_bytes`."""
    try:
        with build_opener(_NoRedirects).open(url, timeout=SECONDS) as answer:
            data = _read(answer, most_bytes, time.monotonic() + SECONDS)
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise InputError(f"the picture {url[:200]!r} cannot be fetched: {error}", do="send it as a data URI") from error
    if len(data) > most_bytes:
        raise InputError(f"the picture {url[:200]!r} is longer than {most_bytes:,} bytes", do="make it smaller first")
    return data


def _read(answer: Any, most_bytes: int, until: float) -> bytes:
    """All bytes, or one more than `most_bytes`. A timeout of the connection alone would begin anew with every byte."""
    data = bytearray()
    while len(data) <= most_bytes and (part := answer.read1(min(PART, most_bytes + 1 - len(data)))):
        data += part
        if time.monotonic() > until:
            raise TimeoutError(f"it did not arrive within {SECONDS:g} s")
    return bytes(data)
