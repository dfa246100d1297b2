"""Return freed heap memory to the OS (malloc_trim)."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Tensors below 32 MiB are on glibc's heap, which is fragmented after a pass; a no-op with other C libraries."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
