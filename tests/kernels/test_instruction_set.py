"""The instruction set of the operators in C can be chosen: the functions change, the numbers do not."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.native import library as native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
BEST = native.library()
HERE = [*native.LEVELS[: BEST.level + 1], *(["amx"] if BEST.amx else [])]


def total() -> tuple[torch.Tensor, list[int]]:
    """A sum in C, and the addresses of the functions that computed it."""
    x, y, result = torch.arange(37.0), torch.linspace(-1, 1, 37), torch.full((37,), torch.nan)
    with native.noted() as calls:
        native.call("add", x, y, result)
    return result, [call.address for call in calls]


@pytest.mark.parametrize("name", HERE)
def test_the_functions_of_the_chosen_set_run(name: str) -> None:
    expected, _ = total()
    level = native.LEVELS.index(name) if name in native.LEVELS else BEST.level
    with native.instruction_set(name):
        chosen = native.library()
        found, addresses = total()
    assert (chosen.level, chosen.amx) == (level, name == "amx")
    assert addresses == [ctypes.cast(BEST.functions["add", level], ctypes.c_void_p).value]  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert native.library() is BEST


def test_another_thread_keeps_the_best() -> None:
    seen = []
    with native.instruction_set("portable"):
        other = threading.Thread(target=lambda: seen.append(native.library().level))
        other.start()
        other.join()
        assert native.library().level == 0
    assert seen == [BEST.level]


def test_the_block_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), native.instruction_set("portable"):
        raise ZeroDivisionError
    assert native.library() is BEST


def test_a_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(KernelError, match=r"instruction set sse2 is not available(.|\n)*portable"):
        native.instruction_set("sse2").__enter__()
    if not BEST.amx:
        with pytest.raises(KernelError, match="amx"):
            native.instruction_set("amx").__enter__()
