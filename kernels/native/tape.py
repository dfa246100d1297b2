"""Recorded calls of the C library, replayed by one C call: a decode step without per-node Python overhead.

A tape holds addresses, and keeps the tensors at those addresses alive. Between replays only two things change: the
contents of the tensors, and the number of tokens in the caches, one more in each replay. Out-of-bounds reads or writes
of a replay are refused, as in a first call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qpcompile.kernels.native.cells import error_of
from qpcompile.kernels.native.library import RecordedCall, library, name_of

CELLS = 72
"""The argument cells of a `tape_call` in calls.inc."""


class Tape:
    """A sequence of calls recorded by `native.noted`."""

    def __init__(self, calls: Sequence[RecordedCall]) -> None:
        self.calls, self.replays, self.threads = tuple(calls), 0, torch.get_num_threads()
        self._cells = ctypes.create_string_buffer(b"".join(_record(each) for each in calls))

    def replay(self) -> None:
        """Replay the calls, with one more token.

        Raises KernelError if a call refuses its arguments, or cannot allocate its buffers.
        """
        run = library().run_tape
        assert run is not None
        self.replays += 1
        at = ctypes.c_long()
        count = len(self.calls)
        if result := run(ctypes.addressof(self._cells), count, self.replays, self.threads, ctypes.addressof(at)):
            call = self.calls[at.value]
            raise error_of(name_of(call.symbol), call.cells, result)


def _record(call: RecordedCall) -> bytes:
    """One call encoded as `tape_call` of calls.inc."""
    return call.address.to_bytes(8, "little") + call.cells.ljust(8 * CELLS, b"\0")
