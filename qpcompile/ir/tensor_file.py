"""Tensors that are not needed for a while, in a file instead of in memory.

The file lies in the folder for temporary files (`TMPDIR`) and has no name there: nothing is left behind, however a
compile ends. The space is free again when the last reference is gone.
"""

from __future__ import annotations

import tempfile

import torch

from qpcompile.errors import OutputError


class TensorFile:
    """Some tensors by name; they cannot be changed. Raises OutputError where there is no room for them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._layout = [(name, each.shape, each.dtype, each.device) for name, each in tensors.items()]
        try:
            self._file = tempfile.TemporaryFile(prefix="qpcompile-")  # noqa: SIM115 (open as long as this object)
            for tensor in tensors.values():
                self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"what a large model's calibration finds cannot be written: {error.strerror or error}",
                where=tempfile.gettempdir(),
                do="set TMPDIR to a folder with room for about twice the model's 16-bit weights, or solver: rtn",
            ) from error

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors, anew with every call."""
        tensors = {}
        self._file.seek(0)
        for name, shape, dtype, device in self._layout:
            tensor = torch.empty(shape, dtype=dtype)
            self._file.readinto(_bytes_of(tensor))
            tensors[name] = tensor.to(device)
        return tensors


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
