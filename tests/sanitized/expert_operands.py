"""Valid operands of products per expert, small and of random sizes."""

import random
from collections.abc import Callable
from typing import Any

import torch

Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expert_linear(draw: random.Random) -> Arguments:
    tokens, channels = draw.choice((1, 2, 5, 17, 40)), draw.choice((2, 6, 33, 64, 256))
    slots, experts = draw.choice((1, 2, 6)), draw.choice((1, 3, 8))
    x = torch.randn(tokens, draw.choice((1, slots)), channels).to(draw.choice(FLOATS))
    weight = torch.randn(experts, draw.choice((1, 5, 32)), channels).to(x.dtype)
    return {"x": x, "weight": weight, "index": torch.randint(0, experts, (tokens, slots))}


def expert_linear_a16(draw: random.Random) -> Arguments:
    given = expert_linear(draw)
    (experts, features, channels), groups = given["weight"].shape, 2 if given["x"].shape[2] % 2 == 0 else 1
    packed = torch.randint(0, 256, (experts, features, (channels + 1) // 2), dtype=torch.uint8)
    wide = torch.randint(-128, 128, (experts, features, channels), dtype=torch.int8)
    scale = torch.rand(experts, features, groups) + 0.5
    return {"x": given["x"], "weight": draw.choice((packed, wide)), "weight_scale": scale, "index": given["index"]}


def expert_linear_int(draw: random.Random) -> Arguments:
    given = expert_linear_a16(draw)
    tokens, rows, channels = given.pop("x").shape
    q = torch.randint(-128, 128, (tokens, rows, channels), dtype=torch.int8)
    return {"q": q, "scale": torch.rand(tokens, rows, 1) + 0.5, **given, "dtype": draw.choice(FLOATS), "bits": 8}


EXPERTS: dict[str, Callable[[random.Random], Arguments]] = {
    each.__name__: each for each in (expert_linear, expert_linear_a16, expert_linear_int)
}
"""By the name of an operator in the namespace `qpcompile`."""
