"""Turn exceptions of transformers and torch during capture into errors of ours: component, line, reason."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qpcompile.errors import CaptureError, QPCompileError

# Paths of code that is not model code: Python, its packages, and this one.
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parents[1]))


@contextmanager
def component(what: str, owner: str) -> Iterator[None]:
    """Any exception inside becomes a CaptureError that says `what` failed, in which component and line.

    Errors of ours, of the operating system, and too little memory pass as they are.
    """
    try:
        yield
    except (QPCompileError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CaptureError(
            f"{what}: {type(error).__name__}: {first_line(error)}",
            where=f"{owner}, {model_line(error)}",
            do="report this family; a picture or prompt of another size sometimes avoids the branch",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of a message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"


def model_line(error: BaseException) -> str:
    """The innermost line of the model's own code in a traceback: not of Python, torch or the tracing driver."""
    for cause in (error, error.__cause__, error.__context__):
        for frame in reversed(traceback.extract_tb(cause.__traceback__ if cause else None)):
            name = frame.filename
            if "/transformers/models/" in name or not (name.startswith(_LIBRARIES) or "<" in name):
                return f"{name.rsplit('/models/', 1)[-1]}:{frame.lineno}: {frame.line}"
    return "no line of the model's code in the traceback"
