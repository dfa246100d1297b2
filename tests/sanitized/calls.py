"""One call with mutated operands: an operator, its CPU function, or a function of the library; and how it ended.

Valid outcomes are KernelError, a refusal by torch's own schema before the operator is called, and a result of the
dtypes and sizes of the operator's fake kernel or rule. Everything else is a defect.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from bending import bend, emptied
from expert_operands import EXPERTS
from operands import BOUND, DIRECT, Arguments, Draw
from operands import OPERATORS as OTHERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qpcompile.errors import KernelError
from qpcompile.ir import operators
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native import rows as native_rows
from qpcompile.runtime.cpu import torch_operators as bind_torch
from qpcompile.runtime.cpu.bind import UNFIT

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import native_calls

OPERATORS = OTHERS | EXPERTS
OF_SCHEMA = (
    *("Expected a value of type", "expected at most", "missing value for argument", "Overflow when unpacking"),
    "There were no tensor arguments to this function",
)
ON_CPU = {
    name: make
    for name, make in (*OPERATORS.items(), *DIRECT.items())
    if importlib.util.find_spec(f"qpcompile.kernels.{name}.cpu")
}
Types = list[tuple[Any, ...]]


def types_of(results: Any) -> Types:
    """Dtypes and sizes of one or several results."""
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in _several(results)]


def layouts_of(results: Any) -> Types:
    """The same with the strides of the axes longer than 1."""
    found: Types = []
    for tensor in _several(results):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        found.append((tensor.dtype, tuple(tensor.shape), [step for size, step in steps if size > 1 and tensor.numel()]))
    return found


def _several(results: Any) -> Sequence[Tensor]:
    return results if isinstance(results, (tuple, list)) else (results,)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is called, as text; the function of keyword arguments; valid operands.

    expected: what `seen` must find in the results of these arguments; None if nothing is specified.
    refusals: other exceptions that its caller turns into KernelError.
    """

    what: str
    function: Callable[..., Any]
    arguments: Arguments
    expected: Callable[[Arguments], Types] | None = None
    seen: Callable[[Any], Types] = types_of
    refusals: tuple[type[Exception], ...] = ()


def chosen(draw: Draw) -> Chosen:
    """Draw a call."""
    return draw.choice((_operator, _operator, _on_cpu, _on_cpu, _library, _library, _bound))(draw)


def ending(draw: Draw, call: Chosen) -> str:
    """Mutate the operands, make the call and return how it ended; with a colon if that is a defect."""
    arguments = dict(call.arguments)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        bend(draw, arguments, huge=not (call.expected or call.refusals))
    try:
        result = call.function(**arguments)
    except (KernelError, *call.refusals):
        return "refused"
    except Exception as error:  # noqa: BLE001 other exceptions are what this looks for
        return "refused by torch" if any(each in str(error) for each in OF_SCHEMA) else f"raw: {_shown(call, error)}"
    if call.expected is None:
        return "answered"
    try:
        promised = call.expected(arguments)
    except Exception as error:  # noqa: BLE001 the fake kernel or rule must accept what the operator accepts
        return f"answered, but not promised: {_shown(call, error)}"
    made = call.seen(result)
    return "answered" if made == promised else f"wrong: {call.what}: {made}, not {promised}"


def _shown(call: Chosen, error: Exception) -> str:
    said = str(error).partition("\n")[0][:90]
    return f"{call.what.split(' at ')[0]}: {type(error).__name__}: {said}"


def _operator(draw: Draw) -> Chosen:
    name = draw.choice(list(OPERATORS))
    function = getattr(operators.ours, name).default

    def fake(arguments: Arguments) -> Types:
        with FakeTensorMode() as mode:
            fakes = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in arguments.items()}
            return layouts_of(function(**fakes))

    return Chosen(f"qpcompile::{name}", function, OPERATORS[name](draw), fake, layouts_of)


def _on_cpu(draw: Draw) -> Chosen:
    name = draw.choice(list(ON_CPU))
    function = getattr(importlib.import_module(f"qpcompile.kernels.{name}.cpu"), name)
    rule = importlib.import_module(f"qpcompile.kernels.{name}.rule").RULE
    level = draw.randint(-1, native.library().level)

    def run(**arguments: Any) -> Any:
        with _library_of(level):
            return function(*rule.arguments((), arguments))

    def promised(arguments: Arguments) -> Types:
        return rule.results(*rule.arguments((), arguments))

    return Chosen(f"{name}.cpu.{name} at level {level}", run, ON_CPU[name](draw), promised)


def _bound(draw: Draw) -> Chosen:
    name = draw.choice(list(BOUND))
    return Chosen(f"bind_torch.{name}", getattr(bind_torch, name), BOUND[name](draw), refusals=UNFIT)


def _library(draw: Draw) -> Chosen:
    case = draw.choice(native_calls.HERE)
    symbol, make = native_calls.CALLS[case]
    level = None if symbol in native.AMX else draw.randint(0, native.library().level)
    arguments = emptied(draw, make()) if draw.random() < 0.3 else make()
    return Chosen(f"{symbol} at level {level}", lambda **given: native_calls.make(symbol, given, level), arguments)


@contextmanager
def _library_of(level: int) -> Iterator[None]:
    """The library as on a processor of a lower level; below 0 there is none, and operators run on torch."""
    best = native.library()
    path = best.path if level >= 0 else None
    here = dataclasses.replace(best, path=path, level=max(level, 0), amx=best.amx and level == best.level)
    with mock.patch.object(native, "library", lambda: here), mock.patch.object(native_rows, "library", lambda: here):
        yield
