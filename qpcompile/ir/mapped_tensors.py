"""Tensors in files instead of memory, mapped for reading.

A page of a mapped file takes memory only once it is read, and the system drops it again when it needs room. Nothing may
write to such a tensor: the system would end the process. Passes replace tensors and never write to them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qpcompile.errors import OutputError
from qpcompile.ir.heap import trim
from qpcompile.write_errors import writing

_LOG = logging.getLogger("qpcompile")

# Smaller tensors stay in memory: a mapping takes whole pages.
LARGE = 2**20
Memory = ctypes.Array[ctypes.c_ubyte] | None
"""A mapped file; None if it is empty."""
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Offload:
    """Moves large tensors into unlinked files of a folder; without a folder they stay in memory.

    Nothing remains in the folder, however a compile ends; the space of a tensor is freed with its last reference.
    """

    folder: Path | None = None

    @classmethod
    def open(cls, folder: str | PathLike[str] | None) -> Offload:
        """For a folder, which is created if it does not exist. Raises OutputError if it cannot be."""
        if folder is None:
            return cls()
        path = Path(folder)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        _LOG.info("new weights are written to files in %s, block by block", path)
        return cls(path)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, in a file if it is large. Raises OutputError if the disk has no room for it."""
        if self.folder is None or tensor.nbytes < LARGE or tensor.device.type != "cpu":
            return tensor
        moved = to_file({"": tensor}, self.folder)[""]
        trim()  # of the work on this tensor
        return moved


def to_file(tensors: dict[str, torch.Tensor], folder: Path | None = None) -> dict[str, torch.Tensor]:
    """The same tensors, in one unlinked file of `folder` (default: that for temporary files, TMPDIR).

    Raises OutputError if the disk has no room for them.
    """
    places: dict[str, int] = {}
    try:
        with tempfile.TemporaryFile(prefix="qpcompile-", dir=folder) as file:
            for name, tensor in tensors.items():
                places[name] = _write(file, tensor)
            file.flush()
            memory = map_file(file)
    except OSError as error:
        raise OutputError(
            f"the temporary file of tensors that are not kept in memory cannot be written: {error.strerror or error}",
            where=str(folder) if folder is not None else _temporary(),
            do="give more room: the folder of --offload takes once the model's weights; TMPDIR, where there is no such "
            "folder, takes calibration statistics, about twice the weights unless solver: rtn",
        ) from error
    return {
        name: mapped(memory, tensor.dtype, tensor.shape, places[name]).to(tensor.device)
        for name, tensor in tensors.items()
    }


def map_file(file: BinaryIO) -> Memory:
    """Map a whole file for reading, until its last tensor is gone. Raises OSError.

    Python's own mmap keeps a descriptor open for each mapping, and a process may have a thousand.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    place = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if place is None or place == _FAILED:
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    memory = (ctypes.c_ubyte * size).from_address(place)
    # Not at the end of the process: tensors may be read until then.
    weakref.finalize(memory, library.munmap, place, size).atexit = False
    return memory


def mapped(memory: Memory, dtype: torch.dtype, shape: Any, offset: int) -> torch.Tensor:
    """The tensor at an offset, in bytes, of a mapped file; it keeps the mapping alive."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    assert memory is not None
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _write(file: BinaryIO, tensor: torch.Tensor) -> int:
    """Append a tensor; returns its offset, a multiple of 64 bytes."""
    file.write(bytes(-file.tell() % 64))
    place = file.tell()
    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return place


def _temporary() -> str:
    """The folder for temporary files; looking for one fails if no disk has room."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "TMPDIR"
