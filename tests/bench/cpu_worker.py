"""The protocol of a peer's process: one JSON line per message, on a channel that libraries cannot print into.

A worker loads its model, reports what it loaded, then waits. For each number received it answers that prompt once and
reports how long the first token and the others took. It imports the standard library only, so that every peer's
environment can run it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Called with a question: "prompt" (its number) and, if they differ, "side" and "batch". Returns the clock's result and
# optional further fields.
Ask = Callable[[dict[str, int]], dict[str, Any]]
# The file in a prepared folder that gives the weights that a decode step reads, in MB.
STEP = "step_mb.json"


def now() -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this process, which do not depend on the load of the machine."""
    return time.perf_counter(), time.process_time()


class Clock:
    """Records the time of each new token; a streamer of transformers, whose first call receives the prompt."""

    def __init__(self, prompt_first: bool = True) -> None:
        self.skip = 1 if prompt_first else 0
        self.start = now()
        self.times: list[tuple[float, float]] = []

    def put(self, value: Any) -> None:
        """A new token, or the prompt."""
        if self.skip:
            self.skip -= 1
        else:
            self.times.append(now())

    def end(self) -> None:
        """Nothing to flush."""

    def result(self) -> dict[str, float]:
        """Milliseconds to the first token, and per token after it, by both clocks."""
        found: dict[str, float] = {"tokens": len(self.times)}
        for kind, start, first, last in zip(("wall", "core"), self.start, self.times[0], self.times[-1], strict=True):
            found[f"first_{kind}_ms"] = 1e3 * (first - start)
            if len(self.times) > 1:
                found[f"decode_{kind}_ms"] = 1e3 * (last - first) / (len(self.times) - 1)
        return found


def memory_mb() -> dict[str, float]:
    """Resident memory of this process, now and at its peak, in MB (10^6 bytes), and its part without file mappings."""
    fields = {}
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        name, _, rest = line.partition(":")
        if rest.strip().endswith("kB"):
            fields[name] = int(rest.split()[0]) * 1024 / 1e6
    return {"peak_mb": fields["VmHWM"], "resident_mb": fields["VmRSS"], "private_mb": fields["RssAnon"]}


def folder_mb(folder: Path, *patterns: str) -> float:
    """Size of a folder's files whose names match, in MB (10^6 bytes)."""
    return sum(path.stat().st_size for pattern in patterns for path in folder.rglob(pattern)) / 1e6


def versions() -> dict[str, str]:
    """Versions of the imported packages that affect the timings."""
    known = ("torch", "transformers", "onnxruntime", "openvino", "openvino_genai", "nncf", "optimum-intel")
    found = {}
    for name in known:
        if name.replace("-", "_") in sys.modules:
            found[name] = version(name)
    return found


def serve(load: Callable[[], tuple[Ask, dict[str, Any]]]) -> None:
    """Load, report, then answer until the other side closes; every failure is reported in one line."""
    # Output of libraries goes to stderr; the channel is the original stdout.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(**fields: Any) -> None:
        channel.write(json.dumps(fields) + "\n")

    try:
        started = time.perf_counter()
        ask, loaded = load()
        found = {**versions(), **loaded.pop("versions", {})}
        say(load_s=time.perf_counter() - started, versions=found, **loaded, **memory_mb())
        for line in sys.stdin:
            say(**ask(json.loads(line)), **memory_mb())
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        say(failed=f"{type(error).__name__}: {text[0][:300]}")
        raise
