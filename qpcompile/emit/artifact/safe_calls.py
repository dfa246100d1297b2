"""Static safety checks of the calls in a saved graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

# Results of these may alias their first operand, although their schema does not declare it.
_MAYBE_THE_SAME = frozenset(
    f"aten::{name}" for name in ("contiguous", "reshape", "flatten", "to", "type_as", "dropout", "expand_as", "chunk")
)


def bad_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What is wrong with the arguments of a call, by names, counts and constants; "" for nothing."""
    if not isinstance(target, torch._ops.OpOverload):
        if target is operator.getitem:
            fine = len(args) == 2 and isinstance(args[0], fx.Node) and isinstance(args[1], int) and not kwargs
            return "" if fine and args[1] >= 0 else "it takes a value and the number of a part of it"
        # For sizes only: on text and lists these functions mean repetition, which can exhaust memory.
        fine = not kwargs and all(_is_number(each) for each in args)
        return "" if fine else "it takes numbers and values that are not lists"
    if target._schema.is_mutable and not (args and _made_by_the_graph(args[0])):
        return "it changes what is not the graph's own"
    if problem := _undefined(target, args, kwargs):
        return problem
    known = target._schema.arguments
    if kwargs and target.namespace == "qpcompile":
        return f"it has no argument by name, as {next(iter(kwargs))!r:.80}; code that binds it reads them by place"
    places = [argument for argument in known if not argument.kwarg_only]
    given = {argument.name for argument in places[: len(args)]}
    if len(args) > len(places):
        return f"{len(args)} arguments for {len(places)} places"
    if unknown := sorted(kwargs.keys() - {argument.name for argument in known}):
        return f"it has no argument {unknown[0]!r:.80}"
    if twice := sorted(given & kwargs.keys()):
        return f"{twice[0]} is given twice"
    needed = [each.name for each in known if not each.has_default_value() and each.name not in given | kwargs.keys()]
    return f"{needed[0]} is not given" if needed else ""


def _is_number(value: Any) -> bool:
    """Whether an argument is a number, or a value that is not a list."""
    if isinstance(value, fx.Node) and isinstance(value.target, torch._ops.OpOverload):
        returned = [str(each.type) for each in value.target._schema.returns]
        return len(returned) == 1 and not returned[0].startswith("List")
    return isinstance(value, (fx.Node, bool, int, float))


def _made_by_the_graph(value: Any) -> bool:
    """Whether a value is in memory allocated by the graph, neither an input's nor a weight's."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        target: Any = value.target
        overload = isinstance(target, torch._ops.OpOverload)
        shares = not overload or any(each.alias_info is not None for each in target._schema.returns)
        if not shares and target._schema.name not in _MAYBE_THE_SAME:
            return True
        value = value.args[0] if value.args else None
    return False


def _undefined(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Checks that torch lacks: violations crash the process, or return uninitialized memory."""
    named = dict(zip((each.name for each in target._schema.arguments), args, strict=False)) | kwargs
    if named.get("rounding_mode") not in (None, "floor"):
        return f"the rounding mode {named['rounding_mode']!r:.80}; a compile writes 'floor'"
    if target._schema.name == "aten::grid_sampler_2d":
        modes = named.get("interpolation_mode"), named.get("padding_mode")
        if not all(isinstance(mode, int) and 0 <= mode <= 2 for mode in modes):
            return f"the modes {modes!r:.80}; there are 0, 1 and 2"
    return ""
