"""The Python functions that a graph may call, on symbolic sizes and tuples; every other call is a torch operator."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

# By name: their types in torch and typeshed are partly unknown.
_BY_MODULE: dict[Any, tuple[str, ...]] = {
    operator: (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "neg"),
        *("eq", "ne", "lt", "le", "gt", "ge", "getitem"),
    ),
    math: ("ceil", "floor", "trunc"),
    torch: ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite"),
}
SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    getattr(module, name) for module, names in _BY_MODULE.items() for name in names
)
