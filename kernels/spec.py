"""The record of an operator: everything the compiler asks about it, in kernels/<op>/spec.py.

    SPEC = Spec(OVERLOAD, RULE, _probe, cpu=cpu.rope, taped=True, onnx=_onnx)

Tables by operator are derived from these records (qpcompile/ir/operators.py), so that adding an operator is adding a
folder. A record imports torch alone: ONNX and Triton are optional, and what needs them imports them when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpcompile.kernels.rules import Rule

Function = Callable[..., Any]
Probe = Callable[[torch.device], tuple[Any, Any] | None]


@dataclass(frozen=True)
class OnnxForm:
    """How an operator is exported."""

    translation: Function
    """Takes the operator's arguments, values of an ONNX graph, and records the nodes that compute its results."""
    lower: Function | None = None
    """For a translation that leaves placeholders: replaces them in a model (onnx_ir.Model), once weights are in it."""


@dataclass(frozen=True)
class Spec:
    """The record of one operator of the namespace `qpcompile`."""

    overload: torch._ops.OpOverload
    """What graphs call."""
    rule: Rule
    """What it may be given and what it gives."""
    probe: Probe
    """One small call of the operator on a device, for `qpcompile doctor`.

    Where the operator is exact, its result and the reference's, which must be equal: integer kernels differ from
    processor to processor.
    """
    cpu: Function | None = None
    """What bound graphs call on the CPU; None: the operator itself, by way of torch's dispatcher."""
    taped: bool = False
    """Whether `cpu` is calls of C alone, which the tape of a decode step records."""
    differentiable: Function | None = None
    """The same in plain torch for blocks that are trained; None: gradients do not pass through the operator."""
    onnx: Callable[[], OnnxForm] | None = None
    """Imports and returns its ONNX form; None: exported graphs never hold the operator."""

    @property
    def name(self) -> str:
        """The operator's name without its namespace, which is its folder's."""
        return self.rule.name.removeprefix("qpcompile::")


def read_specs() -> tuple[Spec, ...]:
    """The record of every operator, sorted by name."""
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py"))
    return tuple(importlib.import_module(f"qpcompile.kernels.{name}.spec").SPEC for name in names)
