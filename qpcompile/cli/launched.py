"""What `torchrun` may start: a compile, which its processes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qpcompile.errors import RankError

SHARED = "compile"


def refuse_several(command: str | None) -> None:
    """Raise RankError if torchrun has started several processes of a command that each would run by itself."""
    if (started := _started()) != "1" and command != SHARED:
        raise RankError(
            f"torchrun has started {started} processes, and only `{SHARED}` shares its work among them",
            where=f"qpcompile {command or ''}".strip(),
            do=f"run it without torchrun; what needs a compile first: torchrun ... -m qpcompile {SHARED}, then this "
            "command on its output",
        )


@contextmanager
def ended_at_once() -> Iterator[None]:
    """If one of several processes fails, it ends without the interpreter's clean-up, which takes seconds: the others
    end because of it. Files have been cleaned up by then.
    """
    try:
        yield
    except SystemExit as error:
        if not error.code or _started() == "1":
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)


def _started() -> str:
    """The number of processes that torchrun has started."""
    return os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
