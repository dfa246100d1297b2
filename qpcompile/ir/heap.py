"""Give memory that is free back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Tensors below 32 MiB come from glibc's heap, which after a pass is mostly holes; other libraries: nothing."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
