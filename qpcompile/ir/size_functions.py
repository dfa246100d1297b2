"""The Python functions that a graph may call, on symbolic sizes and tuples; every other call is a torch operator."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem),
        *(math.ceil, math.floor, math.trunc),
        *(torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite),
    }
)
