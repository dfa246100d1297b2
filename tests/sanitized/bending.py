"""Mutate operands, one at a time: sizes, dtypes, strides, contents, numbers. None takes more than a few MB."""

from collections.abc import Callable

import torch
from operands import Arguments, Draw
from torch import Tensor

NUMBERS = (0, 1, -1, 3, 7, 2**31, 2**40, -(2**40), 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -1.0, 1e300, -1e300, 1e-300, float("nan"), float("inf"), float("-inf"))
FILLS = (torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)
WHOLE_FILLS = (0, -1, 5, 2**30, 2**62, -(2**62), 2**63 - 1, -(2**63))
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32),
    *(torch.int64, torch.bool, torch.complex64),
)
REPEATS = (0, 1, 150)
HUGE = 2**48
"""Repeats of one number whose count overflows when it is multiplied; they take no memory until they are copied."""
Ways = list[Callable[[], Tensor | None]]


def bend(draw: Draw, arguments: Arguments, huge: bool) -> None:
    """Change one argument in place. huge: also into tensors too large to copy into memory."""
    name = draw.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, Tensor):
        arguments[name] = bent_tensor(draw, value, huge) if value.numel() < HUGE else None
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


def emptied(draw: Draw, arguments: Arguments) -> Arguments:
    """Arguments of the library with a size of 0, maybe with a huge one, and empty tensors: they may be consistent."""
    sizes = [name for name, value in arguments.items() if type(value) is int]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    emptied = {name: x.new_empty((0, *x.shape[1:])) for name, x in tensors.items() if draw.random() < 0.5}
    huge = {draw.choice(sizes): draw.choice(NUMBERS)} if sizes and draw.random() < 0.3 else {}
    return arguments | emptied | huge | ({draw.choice(sizes): 0} if sizes else {})


def bent_tensor(draw: Draw, x: Tensor, huge: bool = False) -> Tensor | None:
    """A tensor that differs from x in sizes, type, strides or contents; x where that is not possible."""
    ways = [*_of_all(draw, x), *(_of_an_axis(draw, x, huge) if x.dim() else [])]
    try:
        return draw.choice(ways)()
    except RuntimeError:
        return x


def _of_all(draw: Draw, x: Tensor) -> Ways:
    """Ways to mutate a tensor of any shape."""
    ways: Ways = [
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
    fills = FILLS if x.is_floating_point() else WHOLE_FILLS if x.dtype in (torch.int32, torch.int64) else ()
    return ways + [lambda: fill(x, draw.choice(fills))] * (2 if fills else 0)


def _of_an_axis(draw: Draw, x: Tensor, huge: bool) -> Ways:
    """Ways to mutate one axis."""
    axis = draw.randrange(x.dim())
    size, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]

    def repeated(times: int) -> Tensor:
        return x.narrow(axis, 0, min(1, size)).expand(*before, times, *after)

    return [
        *[lambda: x.narrow(axis, 0, draw.randint(0, size))] * 3,
        *[lambda: torch.cat([x] * draw.choice((2, 3)), axis)] * 2,
        lambda: repeated(draw.choice(REPEATS)),
        lambda: repeated(HUGE if huge else draw.choice(REPEATS)),
        lambda: torch.stack([x, x], -1)[..., 0],
        lambda: x.transpose(axis, -1),
        lambda: x.mT if x.dim() > 1 else x,
        lambda: x.new_empty([*before, 0, *after]),
        lambda: x.squeeze(),
    ]


def fill(x: Tensor, value: float) -> Tensor:
    """x with a number in a random part of it."""
    return x.masked_fill(torch.rand(x.shape) < 0.3, value)


def odd_place(x: Tensor) -> Tensor:
    """x at a misaligned address."""
    raw = bytearray(x.nbytes + 1)
    moved = torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=1) if x.numel() else x.flatten()
    return moved.copy_(x.flatten()).view(x.shape)
