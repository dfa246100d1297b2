"""Calls operators with bent operands and reports what neither refuses nor answers: fuzz.py SEED CALLS [FIRST]

Each call is an operator of the project, its function for the CPU, its C on one instruction set, or a function of the
library with arguments stated by hand. One operand or more is bent: other sizes, types, strides, contents, numbers. In
order are KernelError, what torch's own schema refuses, and a result of the sizes that the operator's fake kernel says.
Other errors and results are listed; with --strict they fail the run. A call that ends the process always does: it is
named, and another process goes on after it. Call I of SEED is repeated by: fuzz.py SEED 1 I
"""

import importlib.util
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from operands import DIRECT, OPERATORS, Arguments, Draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qpcompile.errors import KernelError
from qpcompile.ir import operators
from qpcompile.kernels import native

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import native_calls

SECONDS = 20
MOST_DEATHS = 5
NUMBERS = (0, 1, -1, 3, 7, 2**31, 2**40, -(2**40), 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -1.0, 1e300, -1e300, 1e-300, float("nan"), float("inf"), float("-inf"))
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32),
    *(torch.int64, torch.bool, torch.complex64),
)
OF_SCHEMA = ("Expected a value of type", "expected at most", "missing value for argument", "Overflow when unpacking")
NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "Storage size calculation overflowed")
NATIVE = {
    **dict.fromkeys(("hadamard", "kronecker", "kv4_write", "rmsnorm_quantize", "layernorm_quantize"), "_native"),
    **dict.fromkeys(("silu_mul_quantize", "quantize_int4", "rope", "attention_kv4", "linear_w8a16"), "_native"),
    "linear_w4a4": "_from_packed",
}
"""Functions of cpu.py that call C whatever its operands are."""
NOT_NATIVE = {"linear_w4a4": ("residual",), "attention_kv4": ("filled",), "linear_w8a16": ("bias",)}


ON_CPU = {
    name: make
    for name, make in (*OPERATORS.items(), *DIRECT.items())
    if importlib.util.find_spec(f"qpcompile.kernels.{name}.cpu")
}


class TooSlowError(Exception):
    """A call took longer than SECONDS of the processor."""


def bend(draw: Draw, arguments: Arguments) -> None:
    """Change one argument in place."""
    name = draw.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, Tensor):
        arguments[name] = bent_tensor(draw, value)
    elif isinstance(value, bool):
        arguments[name] = not value
    elif isinstance(value, int):
        arguments[name] = draw.choice((*NUMBERS, value + 1, value - 1))
    elif isinstance(value, float):
        arguments[name] = draw.choice(REALS)
    elif isinstance(value, str):
        arguments[name] = draw.choice(("", "nothing", "rank", "mad", "l1_norm"))
    elif isinstance(value, list):
        arguments[name] = draw.choice(([], value[:-1], [*value, 1.0], [float("nan")] * len(value)))
    elif isinstance(value, torch.dtype):
        arguments[name] = draw.choice(DTYPES)
    else:
        arguments[name] = draw.choice((None, torch.ones(3), torch.ones(0), torch.ones(1, 1, 1, 1), torch.ones(2, 40)))


def bent_tensor(draw: Draw, x: Tensor) -> Tensor | None:
    """A tensor that differs from x in sizes, type, strides or contents."""
    axis = draw.randrange(x.dim()) if x.dim() else 0
    ways: list[Any] = [
        lambda: x.to(draw.choice(DTYPES)),
        lambda: x.to(draw.choice(DTYPES)),
        lambda: x.flatten()[: draw.randint(0, x.numel())],
        lambda: x.reshape(-1),
        lambda: x[None],
        lambda: x.sum().to(x.dtype),
        lambda: None,
        lambda: x.reshape(-1)[:1],
        lambda: torch.randint(0, 256, (max(1, x.nbytes),), dtype=torch.uint8)[: x.nbytes].view(x.dtype).view(x.shape),
        lambda: odd_place(x),
    ]
    if x.is_floating_point():
        ways += [lambda: fill(x, draw.choice((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)))] * 2
    if x.dim():
        size = x.shape[axis]
        ways += [lambda: x.narrow(axis, 0, draw.randint(0, size))] * 3
        ways += [lambda: torch.cat([x] * draw.choice((2, 3)), axis)] * 2
        ways += [
            lambda: x.narrow(axis, 0, min(1, size)).expand(
                *x.shape[:axis], draw.choice((0, 1, 150)), *x.shape[axis + 1 :]
            )
        ]
        ways += [lambda: x.narrow(axis, 0, min(1, size)).expand(*x.shape[:axis], 2**48, *x.shape[axis + 1 :])]
        ways += [
            lambda: torch.stack([x, x], -1)[..., 0],
            lambda: x.transpose(axis, -1),
            lambda: x.mT if x.dim() > 1 else x,
        ]
        ways += [lambda: x.new_empty([*x.shape[:axis], 0, *x.shape[axis + 1 :]]), lambda: x.squeeze()]
    try:
        return draw.choice(ways)()
    except RuntimeError:
        return x


def fill(x: Tensor, value: float) -> Tensor:
    """x with a number in a random part of it."""
    return torch.where(torch.rand(x.shape) < 0.3, value, x.float()).to(x.dtype)


def odd_place(x: Tensor) -> Tensor:
    """x where no element of its size should lie."""
    raw = bytearray(x.nbytes + 1)
    moved = torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=1) if x.numel() else x.flatten()
    return moved.copy_(x.flatten()).view(x.shape)


def chosen(draw: Draw) -> tuple[str, Any, Arguments]:
    """What is called, in words, as a function of keyword arguments, and operands that are in order."""
    way = draw.choice(("operator", "operator", "cpu", "native", "library"))
    if way == "library":
        case = draw.choice(native_calls.HERE)
        symbol, make = native_calls.CALLS[case]
        level = None if symbol in native.AMX else draw.randint(0, native.library().level)
        return f"{symbol} at level {level}", lambda **given: native_calls.make(symbol, given, level), make()
    if way == "native":
        name = draw.choice(list(NATIVE))
        function = getattr(importlib.import_module(f"qpcompile.kernels.{name}.cpu"), NATIVE[name])
        level, arguments = draw.randint(0, native.library().level), OPERATORS[name](draw)
        arguments = {key: value for key, value in arguments.items() if key not in NOT_NATIVE.get(name, ())}
        if name == "linear_w8a16":
            arguments["rows"] = arguments.pop("x")
        if any(isinstance(value, Tensor) and value.dtype == torch.float16 for value in arguments.values()):
            arguments = {
                key: value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
                for key, value in arguments.items()
            }
        return f"{name}.cpu.{NATIVE[name]} at level {level}", lambda **given: function(**given, level=level), arguments
    made = OPERATORS if way == "operator" else ON_CPU
    name = draw.choice(list(made))
    if way == "operator":
        return f"qpcompile::{name}", getattr(operators.ours, name).default, made[name](draw)
    module = importlib.import_module(f"qpcompile.kernels.{name}.cpu")
    return f"{name}.cpu.{name}", getattr(module, name), made[name](draw)


def answer(seed: int, number: int) -> str:
    """Make one call and say how it ended."""
    draw = Draw(f"{seed} {number}")
    torch.manual_seed(draw.randrange(2**31))
    what, function, arguments = chosen(draw)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        bend(draw, arguments)
    try:
        result = function(**arguments)
    except KernelError:
        return "refused"
    except TooSlowError:
        return f"slow: {what}"
    except Exception as error:  # noqa: BLE001 what a caller must never see is what this looks for
        if any(each in str(error) for each in OF_SCHEMA):
            return "refused by torch"
        if isinstance(error, MemoryError) or any(each in str(error) for each in NO_MEMORY):
            return "no memory"
        said = str(error).partition("\n")[0][:90]
        return f"raw: {what.split(' at ')[0]}: {type(error).__name__}: {said}"
    wrong = wrong_sizes(function, arguments, result) if what.startswith("qpcompile::") else ""
    return f"wrong: {what}: {wrong}" if wrong else "answered"


def wrong_sizes(function: Any, arguments: Arguments, result: Any) -> str:
    """How the sizes of a result differ from those of the fake kernel; empty where they do not, or it refuses."""
    try:
        with FakeTensorMode() as mode:
            fakes = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in arguments.items()}
            expected = function(**fakes)
    except Exception:  # noqa: BLE001 a fake kernel may know less than the operator
        return ""
    pairs = zip(*(each if isinstance(each, (tuple, list)) else (each,) for each in (result, expected)), strict=True)
    differ = [
        f"{made.dtype}{list(made.shape)}, not {fake.dtype}{list(fake.shape)}"
        for made, fake in pairs
        if made.shape != fake.shape or made.dtype != fake.dtype
    ]
    return "; ".join(differ)


def work(seed: int, first: int, end: int) -> int:
    """The calls of one process; the number of each is printed before it is made."""

    def too_slow(*_: Any) -> None:
        raise TooSlowError

    signal.signal(signal.SIGPROF, too_slow)
    for number in range(first, end):
        print(f"@{number}", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        said = answer(seed, number)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(said, flush=True)
    return 0


def main(seed: int, calls: int, first: int, strict: bool) -> int:
    """Run the calls in processes that may die."""
    print(f"seed {seed}, {calls} calls on {', '.join(native.LEVELS[: native.library().level + 1])}", flush=True)
    counts, deaths, end = Counter[str](), 0, first + calls
    bad: dict[str, int] = {}
    while first < end and deaths < MOST_DEATHS:
        command = [sys.executable, __file__, "--work", str(seed), str(first), str(end)]
        done = subprocess.run(command, capture_output=True, text=True)
        last = first - 1
        for line in done.stdout.splitlines():
            if line.startswith("@"):
                last = int(line[1:])
            else:
                counts[line.split(":")[0]] += 1
                bad.setdefault(line, last) if ":" in line else None
        if done.returncode == 0:
            break
        deaths += 1
        print(
            f"DEATH in call {last}: python tests/sanitized/fuzz.py {seed} 1 {last}\n{done.stderr[-6000:]}", flush=True
        )
        first = last + 1
    for line, number in sorted(bad.items()):
        print(f"  call {number}: {line}")
    print(f"seed {seed}: {dict(counts)}, {deaths} deaths, {len(bad)} kinds of other endings")
    return int(deaths > 0 or (strict and bool(bad)))


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        sys.exit(work(*map(int, sys.argv[2:5])))
    numbers = [int(each) for each in sys.argv[1:] if not each.startswith("-")]
    seed, calls, first = (*numbers, *(random.randrange(2**31), 3000, 0)[len(numbers) :])
    sys.exit(main(seed, calls, first, "--strict" in sys.argv))
