"""Join the processes that `torchrun` has started to one compile, and notice when one of them ends.

Collectives are gloo's. Beside the group that they use there is a second one: on it every rank awaits a message from
every other, which is sent only when all is done. The system closes a connection with its process, so that the end of a
process is known within milliseconds, also to ranks that compute or wait for yet another one. They have a few seconds to
end by themselves, with their cleaning up; a rank inside a long operator is then ended hard.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous

from qpcompile.errors import KernelError, QPCompileError, RankError
from qpcompile.ranks import Lost, Ranks, ended

_DONE, _FAILED = 1, 2
SIZE, RANK, LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"
_NEEDED = (RANK, LOCAL_RANK, "MASTER_ADDR", "MASTER_PORT")
# How long to wait for all processes to start, and how long a rank may take to end once another one has.
STARTS = timedelta(seconds=120)
_ENDS = 4.0
# How long the news that a rank has ended may take.
_TOLD = 1.0
# Ranks wait for one another as long as the work of one takes; a rank that has ended is noticed in another way.
_ALWAYS = timedelta(days=30)


def asked_size() -> int:
    """The number of processes by the environment that torchrun sets; 1 without it. Raises RankError if it is none."""
    text = os.environ.get(SIZE, "1")
    if not text.isdecimal() or int(text) < 1:
        raise _unusable(f"{SIZE} is {text!r}, not a number of processes")
    return int(text)


@contextmanager
def joined(starts: timedelta = STARTS) -> Iterator[Ranks]:
    """The ranks of this compile; all of them begin the block and end it together.

    Raises RankError if the environment is incomplete, if processes do not start in time, and in place of what the block
    raises, if that is because another rank has ended.
    """
    size = asked_size()
    if size == 1:
        yield Ranks()
        return
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise _unusable(f"{SIZE} is {size}, but {', '.join(missing)} is not set")
    if not (rank := os.environ[RANK]).isdecimal() or int(rank) >= size:
        raise _unusable(f"{RANK} is {rank!r}, and there are {size} processes")
    if not (own := os.environ[LOCAL_RANK]).isdecimal() or int(own) >= size:
        raise _unusable(f"{LOCAL_RANK} is {own!r}, and there are {size} processes")
    ranks = Ranks(int(rank), size, Lost())
    _join(ranks, starts)
    watch = _Watch(ranks)
    try:
        yield ranks
        watch.part()
    except QPCompileError:
        watch.fail()
        raise
    except BaseException as error:
        # torchrun stops the others as soon as one has ended: that is the reason to tell.
        ranks.lost.known.wait(_TOLD)
        watch.fail()
        if ranks.lost.rank is None:
            raise
        raise ended(ranks) from error


def local_device(device: str | None) -> str | None:
    """The device of this process for `--device`: each has a GPU of its own, unless a number is given.

    Raises KernelError if this machine has fewer GPUs than processes.
    """
    if device != "cuda" or asked_size() == 1:
        return device
    own, there = int(os.environ.get(LOCAL_RANK, "0")), torch.cuda.device_count()
    if own >= there:
        raise KernelError(
            f"process {own} of this machine has no GPU of its own: torch sees {there}",
            where="device",
            do="start one process per GPU (torchrun --nproc-per-node), or compute on the processor without --device",
        )
    return f"cuda:{own}"


def _join(ranks: Ranks, starts: timedelta) -> None:
    """Set up torch.distributed, once all processes have come."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=starts))
        store.set(f"come/{ranks.rank}", "")
        for other in range(ranks.size):
            store.wait([f"come/{other}"], starts)
        distributed.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=_ALWAYS)
    except (RuntimeError, ValueError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankError(
            f"of the {ranks.size} processes not all came within {starts.total_seconds():.0f} s: {text}",
            where=f"rank {ranks.rank} of {ranks.size} ({SIZE})",
            do=f"start them with torchrun, or unset {SIZE} to compile in one process",
        ) from error


class _Watch:
    """Awaits a message from every other rank; see the module's docstring."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._ending = ranks, False
        group = distributed.new_group(backend="gloo", timeout=_ALWAYS)
        assert isinstance(group, distributed.ProcessGroup)
        self._group = group
        self._others = [other for other in range(ranks.size) if other != ranks.rank]
        self._threads = [threading.Thread(target=self._await, args=(other,), daemon=True) for other in self._others]
        for thread in self._threads:
            thread.start()

    def part(self) -> None:
        """Wait until all ranks are done, and leave them."""
        self.ranks.gathered("done")
        self._end(_DONE)

    def fail(self) -> None:
        """Tell the others that this rank ends now, and wait shortly until they do too."""
        if threading.current_thread() is threading.main_thread():
            # This process is ending: a signal to do so would only replace the reason.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._end(_FAILED)

    def _end(self, word: int) -> None:
        self._ending = True
        for other in self._others:
            with suppress(RuntimeError):  # it has ended before
                distributed.send(torch.tensor([word], dtype=torch.uint8), other, group=self._group)
        if word == _FAILED:
            # Exchanges that others wait in fail now; the group of this watch is closed later, with its threads.
            distributed.destroy_process_group()
        # A thread that is inside an operator when the interpreter ends aborts the process.
        until = time.monotonic() + (_TOLD if word == _FAILED else _ENDS)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        if word == _DONE:
            distributed.destroy_process_group()

    def _await(self, other: int) -> None:
        word = torch.zeros(1, dtype=torch.uint8)
        with suppress(RuntimeError):  # its connection is closed: nothing has come
            distributed.recv(word, other, group=self._group)
        if int(word) == _DONE:
            return
        self.ranks.lost.note(other)
        until = time.monotonic() + _ENDS
        while time.monotonic() < until and not self._ending:
            time.sleep(_TOLD / 10)
        if self._ending:
            return
        # The main thread is inside an operator, and a signal would wait for its end.
        with suppress(OSError, ValueError):
            print(f"error: {ended(self.ranks)}", file=sys.stderr, flush=True)
        os._exit(1)


def _unusable(what: str) -> RankError:
    return RankError(
        what,
        where="the environment of this process",
        do=f"start with torchrun (torchrun --nproc-per-node 2 -m qpcompile compile ...), or unset {SIZE}",
    )
