"""torch's operators as objects: whether something is one, and its arguments. torch exports neither by a public name."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch._ops import OpOverload


def is_overload(target: object) -> TypeGuard[OpOverload[..., Any]]:
    """Whether the target of a call is an operator, torch's or ours, and not a Python function."""
    return isinstance(target, OpOverload)


def schema(operator: OpOverload[..., Any]) -> torch.FunctionSchema:
    """An operator's declaration: its `name` without the overload, `arguments` and `returns`."""
    return operator._schema


def overload_name(operator: OpOverload[..., Any]) -> str:
    """The name of an operator's overload: `default`, `Tensor`, `int`."""
    return operator._overloadname
