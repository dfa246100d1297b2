"""What `torchrun` may start: a compile, which its processes share."""

from __future__ import annotations

import os

from qpcompile.errors import RankError

SHARED = "compile"


def refuse_several(command: str | None) -> None:
    """Raise RankError if torchrun has started several processes of a command that each would run by itself."""
    started = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if started != "1" and command != SHARED:
        raise RankError(
            f"torchrun has started {started} processes, and only `{SHARED}` shares its work among them",
            where=f"qpcompile {command or ''}".strip(),
            do=f"run it without torchrun; what needs a compile first: torchrun ... -m qpcompile {SHARED}, then this "
            "command on its output",
        )
