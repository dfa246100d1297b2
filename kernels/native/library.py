"""Loader of the compiled C library with the operators' CPU kernels: location, instruction set, calls.

kernels/native/native.c is compiled when the package is installed, if there is a C compiler, and loaded here with
ctypes. If it is missing or does not match the sources next to it, the operators run on torch, and `qpcompile doctor`
reports that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_char_p, c_int, c_long, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.native.cells import SIGNATURES, error_of, packed

MODULE = "qpcompile._native"
LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets that the library is compiled for, the best last; a level is an index into this."""
INSTRUCTION_SETS = (*LEVELS, "amx")
"""The instruction sets that `instruction_set` takes; amx is avx512 and AMX tiles."""
READABLE = frozenset({torch.float32, torch.bfloat16, torch.bool})
"""The types of activations and masks that the functions read."""

Function = Callable[[bytes, int, int], int]
AMX = ("linear_int_amx", "attention_amx", "attention_mass_amx", "change_tiles_amx")
"""Functions that need AMX tiles, available if `Library.amx`."""
EXACT = (
    *("linear_int", "expert_linear_int", "unpack_int4", "scale_int32", "kv_write", "rope", "add", "append"),
    *("linear", "linear_w8a16", "linear_w4a16", "dequantize_int4"),
)
"""Functions of integer and float32 operations only: one per level. The others exist in float64 (`_f64`, for float64
rows) and in float32 (`_f32`, for float32 and bfloat16).
"""


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: the function with the suffix of its compute type, its address, and its arguments.

    tensors: those whose addresses are in `cells`.
    """

    symbol: str
    address: int
    cells: bytes
    tensors: tuple[Tensor, ...]


_noted: ContextVar[list[RecordedCall] | None] = ContextVar("noted", default=None)
_restricted: ContextVar[Library | None] = ContextVar("restricted", default=None)


@dataclass(frozen=True)
class Library:
    """The loaded library, or the reason why there is none."""

    path: Path | None
    problem: str
    level: int
    threads: bool
    amx: bool
    functions: dict[tuple[str, int], Function]
    """By symbol and level. They take cells (cells.py), the replay count of a tape and a number of threads."""
    run_tape: Callable[..., int] | None = None


def library() -> Library:
    """The library, loaded once per process; inside an `instruction_set` block restricted to that set."""
    return _restricted.get() or _loaded()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of INSTRUCTION_SETS inside the block, in this thread, as on a processor that has no better one.

    Load the model inside the block too: some tables are laid out when operators are bound. torch's own operators and
    oneDNN's keep the processor's best.

    Raises KernelError if there is no such set here.
    """
    best = _loaded()
    here = [] if best.path is None else [*LEVELS[: best.level + 1], *(["amx"] if best.amx else [])]
    if name not in here:
        raise KernelError(
            f"instruction set {name} is not available",
            where=f"the operators in C: {best.problem or 'this processor'}",
            do=f"choose one of {', '.join(here)}"
            if here
            else "install a wheel for this platform, or build with a compiler",
        )
    level = best.level if name == "amx" else LEVELS.index(name)
    before = _restricted.set(replace(best, level=level, amx=name == "amx"))
    try:
        yield
    finally:
        _restricted.reset(before)


@functools.cache
def _loaded() -> Library:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return _none("the installed package has none: its wheel is for any platform, or there was no C compiler")
    path = Path(spec.origin)
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.qp_sources.restype = ctypes.c_char_p
        made_of = loaded.qp_sources().decode()
    except (OSError, AttributeError) as error:
        return _none(f"{path.name} does not load: {error}")
    if (here := sources_digest()) and here != made_of:
        return _none(f"{path.name} was compiled from other sources than the installed ones: install the package again")
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
    loaded.qp_run_tape.argtypes, loaded.qp_run_tape.restype = (c_void_p, c_long, c_long, c_int, c_void_p), c_long
    return Library(path, "", best, bool(loaded.qp_openmp()), amx, functions, loaded.qp_run_tape)


def sources_digest() -> str:
    """SHA-256 of the sources if they are installed too, as setup.py computes it; empty if they are not."""
    folder = Path(__file__).parents[1]
    parts = [folder / "native" / "native.c", *sorted(folder.rglob("*.inc"))]
    if not parts[0].is_file():
        return ""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes())
    return total.hexdigest()


def available() -> bool:
    """Whether the operators may use the library."""
    return library().path is not None


def call(symbol: str, *arguments: object, level: int | None = None) -> None:
    """Call a function of the library with the threads that torch uses.

    arguments: in the order of SIGNATURES in cells.py, tensors as torch tensors.

    Raises KernelError if they do not match, and if the function cannot allocate its buffers.
    """
    loaded = library()
    name = name_of(symbol)
    function = loaded.functions[symbol, loaded.level if level is None else level]
    cells = packed(name, arguments)
    if result := function(cells, 0, torch.get_num_threads()):
        raise error_of(name, cells, result)
    if (calls := _noted.get()) is not None:
        address = ctypes.cast(function, c_void_p).value  # type: ignore[arg-type]
        calls.append(
            RecordedCall(symbol, address or 0, cells, tuple(each for each in arguments if isinstance(each, Tensor)))
        )


@contextmanager
def noted() -> Iterator[list[RecordedCall]]:
    """Record every call made inside the block, in order."""
    calls: list[RecordedCall] = []
    before = _noted.set(calls)
    try:
        yield calls
    finally:
        _noted.reset(before)


def real(x: Tensor) -> str:
    """The suffix of the functions that compute for a tensor of this type (kernels/sums.py)."""
    return "f64" if x.dtype == torch.float64 else "f32"


def takes(*tensors: Tensor | None) -> bool:
    """Whether the library can read these tensors: of supported types, on the CPU."""
    return available() and all(tensor is None or _readable(tensor) for tensor in tensors)


def computes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the library can compute rows of x, in the type that `real` names, with these other tensors."""
    wide = x.dtype == torch.float64 and x.device.type == "cpu"
    return takes(*others) and (wide or _readable(x))


def _readable(tensor: Tensor) -> bool:
    return tensor.dtype in READABLE and tensor.device.type == "cpu"


def _none(problem: str) -> Library:
    return Library(None, problem, 0, False, False, {})


def _function(loaded: ctypes.CDLL, symbol: str, ending: str) -> Function:
    made = getattr(loaded, f"qp_{symbol}_{ending}")
    made.argtypes, made.restype = (c_char_p, c_long, c_int), c_long
    return made


def name_of(symbol: str) -> str:
    """The name of a function without the suffix of its compute type."""
    return symbol.removesuffix("_f64").removesuffix("_f32")
