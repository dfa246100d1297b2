"""Operator records: everything the compiler needs to know about an operator, in kernels/<op>/spec.py.

    SPEC = Spec(OVERLOAD, RULE, _probe, since="fused", cpu=cpu.rope, taped=True, onnx=_onnx)

Tables by operator are derived from these records (qpcompile/ir/operators.py), so that adding an operator is adding a
folder. A record imports torch only: ONNX and Triton are optional dependencies, and are imported lazily.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpcompile.kernels.rules import Rule
from qpcompile.stages import Stage

Function = Callable[..., Any]
Probe = Callable[[torch.device], tuple[Any, Any] | None]


@dataclass(frozen=True)
class OnnxForm:
    """How an operator is exported."""

    translation: Function
    """Takes the operator's arguments, values of an ONNX graph, and records the nodes that compute its results."""
    lower: Function | None = None
    """For a translation that emits placeholders: replaces them in a model (onnx_ir.Model), once weights have data."""


@dataclass(frozen=True)
class Spec:
    """The record of one operator of the namespace `qpcompile`."""

    overload: torch._ops.OpOverload
    """The call target in graphs."""
    rule: Rule
    """The rule of its operands and results."""
    probe: Probe
    """One small call of the operator on a device, for `qpcompile doctor`.

    For an exact operator it returns the CPU kernel's and the reference's result, which must be equal: integer kernels
    differ between processors.
    """
    since: Stage
    """The earliest stage of a compile at which graphs may contain the operator; `until`: the last one."""
    until: Stage = "fused"
    cpu: Function | None = None
    """The call target of bound graphs on the CPU; None: the operator itself, through torch's dispatcher."""
    taped: bool = False
    """Whether `cpu` consists of C calls only, which the tape of a decode step can record."""
    differentiable: Function | None = None
    """A differentiable version in plain torch, for training; None: the operator is not differentiable."""
    onnx: Callable[[], OnnxForm] | None = None
    """Imports and returns its ONNX form; None: exported graphs never contain the operator."""

    @property
    def name(self) -> str:
        """The operator's name without its namespace, equal to its folder's name."""
        return self.rule.name.removeprefix("qpcompile::")


def read_specs() -> tuple[Spec, ...]:
    """The record of every operator, sorted by name."""
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py"))
    return tuple(importlib.import_module(f"qpcompile.kernels.{name}.spec").SPEC for name in names)
