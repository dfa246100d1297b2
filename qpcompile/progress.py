"""Progress of long operations: a bar on a terminal, periodic log lines elsewhere, with remaining time and memory."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG = logging.getLogger("qpcompile")
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def track(name: str, total: int, *, console: Console | None = None, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` steps; output goes to stderr, or to `console`, or nowhere."""
    if not shown:
        yield lambda: None
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = LogLines(name, total)
        yield lines.step
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _MemoryColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


@dataclass
class LogLines:
    """Progress as log lines, at most one per ten seconds, and one at the end; clock: a time source in seconds."""

    name: str
    total: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    started: float = field(init=False)
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.last = self.clock()

    def step(self) -> None:
        """Count one step, and log it if the last line is old enough."""
        self.done += 1
        now = self.clock()
        if now - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.last = now
        left = (now - self.started) / self.done * (self.total - self.done)
        _LOG.info("%s: %d of %d, %.0f s left, %s", self.name, self.done, self.total, left, memory())

    def finish(self) -> None:
        """Log the total time."""
        took = self.clock() - self.started
        _LOG.info("%s: %d of %d in %.1f s, %s", self.name, self.done, self.total, took, memory())


class _MemoryColumn(ProgressColumn):
    """Memory of this process, beside the bar."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        return Text(memory())


def memory() -> str:
    """Resident memory of this process, as text."""
    return f"{psutil.Process().memory_info().rss / 1024**3:.2f} GiB"
