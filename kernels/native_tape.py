"""Calls of the library that were made once, to be made again by one call of C: a decode step without Python per node.

A tape holds addresses: it does not keep the tensors that lie there. Between replays only two things change: what lies
in the tensors, and the number of tokens in the caches, one more in each replay (native_tape.inc).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.native import SIGNATURES, Call, D, F, library

CELLS = 24
"""The arguments of a `tape_call` in native.c."""


class Tape:
    """Calls as `native.noted` noted them, each of a function that has a form for a tape."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.count, self.replays, self.threads = len(calls), 0, torch.get_num_threads()
        self._cells = ctypes.create_string_buffer(b"".join(_packed(each) for each in calls))

    def replay(self) -> None:
        """Make the calls once more, on one more token."""
        run = library().run_tape
        assert run is not None
        self.replays += 1
        if not run(ctypes.addressof(self._cells), self.count, self.replays, self.threads):
            raise KernelError("there is not enough memory for its buffers", where="qp_run_tape in kernels/native.c")


def _packed(call: Call) -> bytes:
    """`tape_call` of native.c."""
    name = call.symbol.removesuffix("_f64").removesuffix("_f32")
    types = SIGNATURES[name][:-1]
    numbers = [0 if each is None else each for each in call.arguments]
    form = "".join("d" if kind in (D, F) else "q" for kind in types)
    return struct.pack(f"q{form}{8 * (CELLS - len(types))}x", call.on_tape, *numbers)
