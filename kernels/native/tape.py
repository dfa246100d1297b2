"""Calls of the library that were made once, to be made again by one call of C: a decode step without Python per node.

A tape holds addresses, and keeps the tensors that lie there. Between replays only two things change: what lies in the
tensors, and the number of tokens in the caches, one more in each replay. What a replay would read or write past the end
of a tensor is refused, as in a first call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qpcompile.kernels.native.cells import error_of
from qpcompile.kernels.native.library import Call, library, name_of

CELLS = 56
"""The arguments of a `tape_call` in calls.inc."""


class Tape:
    """Calls as `native.noted` noted them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.replays, self.threads = tuple(calls), 0, torch.get_num_threads()
        self._cells = ctypes.create_string_buffer(b"".join(_record(each) for each in calls))

    def replay(self) -> None:
        """Make the calls once more, on one more token.

        Raises KernelError where a call refuses its arguments, or has no memory to work in.
        """
        run = library().run_tape
        assert run is not None
        self.replays += 1
        at = ctypes.c_long()
        count = len(self.calls)
        if result := run(ctypes.addressof(self._cells), count, self.replays, self.threads, ctypes.addressof(at)):
            call = self.calls[at.value]
            raise error_of(name_of(call.symbol), call.cells, result)


def _record(call: Call) -> bytes:
    """`tape_call` of calls.inc."""
    return call.address.to_bytes(8, "little") + call.cells.ljust(8 * CELLS, b"\0")
