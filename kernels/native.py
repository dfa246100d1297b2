"""The operators' C for the CPU: where the compiled library is, which instructions it may use, how it is called.

kernels/native.c is compiled when the package is installed, if there is a C compiler, and loaded here with ctypes. Where
it is missing or does not belong to the sources beside it, the operators run on torch, and `qpcompile doctor` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_double, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qpcompile.errors import KernelError

MODULE = "qpcompile._native"
LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets that the library is compiled for, the best last; the number is the place."""
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 2}
"""The numbers of `enum element` in native.c."""

Function = Callable[..., int]
P, N, L, F, D = c_void_p, c_int, c_long, c_float, c_double
SIGNATURES: dict[str, tuple[type, ...]] = {
    "linear_w4a4": (P, P, P, P, P, N, L, L, L, L, L, P, N, N),
    "linear_w4a4_amx": (P, P, P, P, P, N, P, L, L, L, P, N, N),
    "attention_amx": (*(P,) * 6, *(L,) * 6, F, N),
    "attention_mass_amx": (*(P,) * 6, *(L,) * 6, F, N),
    "change_tiles_amx": (P, P, L, L, P, N),
    "unpack_int4": (P, L, L, P, N),
    "scale_int32": (P, P, P, P, N, L, L, P, N, N),
    "kv4_write": (P, N, L, L, L, L, L, L, L, P, P, N),
    "rope": (*(P,) * 4, *(N,) * 2, *(L,) * 13, N),
    "rows": (P, P, P, L, P, P, P, N),
    "gates": (P, P, N),
    "linear": (P, P, L, L, L, P, N),
    "linear_w8a16": (P, N, P, P, L, L, L, P, N),
    "add": (P, P, P, N, L, N),
    "append": (P, P, L, L, L, L, N),
    "attention_kv4": (P, N, L, L, L, P, P, P, P, P, N, L, L, L, L, D, *(L,) * 7, P, N),
}
AMX = ("linear_w4a4_amx", "attention_amx", "attention_mass_amx", "change_tiles_amx")
"""Functions that need AMX tiles, there where `Library.amx` says so."""
EXACT = ("linear_w4a4", "unpack_int4", "scale_int32", "kv4_write", "rope", "add", "append", "linear", "linear_w8a16")
"""Functions of integers and of float32 operations alone: there is one per level. The others are there in
float64 (`_f64`, for float32 tensors) and in float32 (`_f32`, for half precision)."""
ON_TAPE = ("linear_w4a4", "linear_w4a4_amx", "kv4_write", "rope", "rows", "attention_kv4", "add", "append")
"""Functions that a tape may hold (native_tape.py)."""


@dataclass(frozen=True)
class Call:
    """A call that was made: the function with the ending of its arithmetic, where its form for a tape is, arguments."""

    symbol: str
    on_tape: int
    arguments: tuple[object, ...]


_noted: ContextVar[list[Call] | None] = ContextVar("noted", default=None)


@dataclass(frozen=True)
class Library:
    """The loaded library, or the reason why there is none."""

    path: Path | None
    problem: str
    level: int
    threads: bool
    amx: bool
    functions: dict[tuple[str, int], Function]
    on_tape: dict[tuple[str, int], int] = field(default_factory=dict)
    """Where the forms of functions for a tape lie in memory, 0 for those that have none."""
    run_tape: Function | None = None


@functools.cache
def library() -> Library:
    """Load the library once per process."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return _none("it was not compiled: no C compiler was found when the package was installed")
    path = Path(spec.origin)
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.qp_sources.restype = ctypes.c_char_p
        made_of = loaded.qp_sources().decode()
    except (OSError, AttributeError) as error:
        return _none(f"{path.name} does not load: {error}")
    if (here := sources_digest()) and here != made_of:
        return _none(f"{path.name} was compiled from other sources than those that lie here: install the package again")
    best = int(loaded.qp_level())
    amx = bool(loaded.qp_amx())
    functions = {
        (symbol, level): _function(loaded, symbol, LEVELS[level])
        for name in SIGNATURES
        if name not in AMX
        for symbol in ([name] if name in EXACT else [f"{name}_f64", f"{name}_f32"])
        for level in range(best + 1)
    }
    if amx:
        functions |= {(name, best): _function(loaded, name.removesuffix("_amx"), "amx") for name in AMX}
    on_tape = {key: _on_tape(loaded, *key) for key in functions}
    loaded.qp_run_tape.argtypes, loaded.qp_run_tape.restype = (P, L, L, N), c_int
    return Library(path, "", best, bool(loaded.qp_openmp()), amx, functions, on_tape, loaded.qp_run_tape)


def sources_digest() -> str:
    """SHA-256 of the sources where they are installed too, as setup.py computes it; empty where they are not."""
    folder = Path(__file__).parent
    parts = [folder / "native.c", *sorted(folder.rglob("*.inc"))]
    if not parts[0].is_file():
        return ""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes())
    return total.hexdigest()


def available() -> bool:
    """Whether the operators may use the library."""
    return library().path is not None


def call(name: str, *arguments: object, level: int | None = None) -> None:
    """Call a function of the library with the threads that torch uses.

    Raises KernelError where it had no memory to work in.
    """
    loaded = library()
    key = name, loaded.level if level is None else level
    if not loaded.functions[key](*arguments, torch.get_num_threads()):
        raise KernelError("there is not enough memory for its buffers", where=f"qp_{name} in kernels/native.c")
    if (calls := _noted.get()) is not None:
        calls.append(Call(name, loaded.on_tape[key], arguments))


@contextmanager
def noted() -> Iterator[list[Call]]:
    """Every call that is made inside, in order."""
    calls: list[Call] = []
    before = _noted.set(calls)
    try:
        yield calls
    finally:
        _noted.reset(before)


def pointer(tensor: Tensor | None) -> int | None:
    """Where the data of a contiguous tensor lies; None stays None."""
    return None if tensor is None else tensor.data_ptr()


def real(x: Tensor) -> str:
    """The ending of functions that compute for a tensor of this type (kernels/sums.py)."""
    return "f64" if x.dtype == torch.float32 else "f32"


def takes(*tensors: Tensor | None) -> bool:
    """Whether the library can read these: tensors of types it knows, on the CPU."""
    return available() and all(tensor is None or _readable(tensor) for tensor in tensors)


def _readable(tensor: Tensor) -> bool:
    return tensor.dtype in ELEMENTS and tensor.device.type == "cpu"


def _none(problem: str) -> Library:
    return Library(None, problem, 0, False, False, {})


def _function(loaded: ctypes.CDLL, symbol: str, ending: str) -> Function:
    made = getattr(loaded, f"qp_{symbol}_{ending}")
    made.argtypes = SIGNATURES[f"{symbol}_amx" if ending == "amx" else _name(symbol)]
    made.restype = c_int
    return made


def _on_tape(loaded: ctypes.CDLL, symbol: str, level: int) -> int:
    if _name(symbol) not in ON_TAPE:
        return 0
    made = getattr(loaded, f"qp_tape_{symbol}" if symbol in AMX else f"qp_tape_{symbol}_{LEVELS[level]}")
    return ctypes.cast(made, c_void_p).value or 0


def _name(symbol: str) -> str:
    """Of a function, without the ending of its arithmetic."""
    return symbol.removesuffix("_f64").removesuffix("_f32")
