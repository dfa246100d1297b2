"""Ranks that are threads of one process, for tests: each with a program of its own, and what they exchange is pickled.

One runs at a time, up to its next exchange: what clones of a program share (types of fake tensors) is not for threads.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qpcompile.ranks import Ranks, Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Thread(Ranks):
    """One of several ranks; `slots` are where they put what they exchange, `turn` is held by the one that runs."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    slots: list[bytes] = field(default_factory=list)

    def gathered(self, value: T) -> list[T]:
        self.slots[self.rank] = pickle.dumps(value)
        self._wait()
        found = [pickle.loads(each) for each in self.slots]
        self._wait()
        return found

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def delivered(self, parcels: Sequence[Tensors]) -> list[Tensors]:
        return [each[self.rank] for each in self.gathered(list(parcels))]


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks; an error of one ends the others too, and is raised."""
    turn, barrier, slots = threading.Lock(), threading.Barrier(size, timeout=300), [b""] * size

    def run(rank: int) -> T:
        try:
            with turn:
                return work(Thread(rank, size, turn=turn, barrier=barrier, slots=slots))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(run, rank) for rank in range(size)]
        errors: list[Any] = [each.exception() for each in waiting]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [each.result() for each in waiting]
