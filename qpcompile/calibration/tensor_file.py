"""Tensors offloaded to an anonymous temporary file.

The file is created unlinked in the folder for temporary files (`TMPDIR`): nothing remains, however a compile ends. The
space is freed with the last reference.
"""

from __future__ import annotations

import tempfile

import torch

from qpcompile.errors import OutputError


class TensorFile:
    """Immutable tensors by name. Raises OutputError if the disk has no room for them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._layout = [(name, each.shape, each.dtype, each.device) for name, each in tensors.items()]
        try:
            self._file = tempfile.TemporaryFile(prefix="qpcompile-")  # noqa: SIM115 (open as long as this object)
            for tensor in tensors.values():
                self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise _lost(f"cannot be written: {error.strerror or error}") from error

    def read(self) -> dict[str, torch.Tensor]:
        """Read the tensors again on every call. Raises OutputError if they cannot be read."""
        tensors = {}
        try:
            self._file.seek(0)
            for name, shape, dtype, device in self._layout:
                tensor = torch.empty(shape, dtype=dtype)
                if self._file.readinto(_bytes_of(tensor)) != tensor.nbytes:
                    raise _lost("is no longer complete")
                tensors[name] = tensor.to(device)
        except OSError as error:
            raise _lost(f"cannot be read again: {error.strerror or error}") from error
        return tensors


def _lost(why: str) -> OutputError:
    return OutputError(
        f"the temporary file of a large model's calibration statistics {why}",
        where=_folder(),
        do="set TMPDIR to a folder with room for about twice the model's 16-bit weights, or solver: rtn",
    )


def _folder() -> str:
    """The folder for temporary files; looking for one fails if no disk has room."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "TMPDIR"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
