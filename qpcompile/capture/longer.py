"""Refuse a decoder whose graph holds for prompts up to some length: its code loops over parts of a prompt in Python.

A graph keeps no guards of the exporter. What they say of longer prompts may hold for the model too, such as the size of
a table of positions, or be of no effect: the model's answer to one such prompt tells them apart.
"""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import sympy
import torch

from qpcompile.capture.logits import HALF
from qpcompile.capture.record import TWO_TOKENS
from qpcompile.capture.text_alone import far_from_model, text_alone
from qpcompile.errors import CaptureError
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.runtime.prepare import EMBEDDINGS

# Largest distance of logits, of their spread, in float32.
EXACT = 1e-2
# Lengths of prompts that are tried; those that code takes apart in parts of are not among them.
LENGTHS = (33, 65, 129, 257, 513, 1025)


def refuse_bound(program: Program, model: Any, sample: dict[str, Any]) -> None:
    """Raise CaptureError if the graphs do not answer a prompt longer than they hold for as the model does.

    sample: a prompt with a picture; text in place of its picture is made longer.
    """
    prefill = program.graphs[PREFILL]
    count, prompt = first_refused(prefill), text_alone(model, sample)
    if count is None or prompt is None:
        return
    longer = {key: _repeated(value, count) for key, value in prompt.items()}
    try:
        expected = torch.stack(cast(Any, model).generate(**longer, **TWO_TOKENS).logits, dim=1)
    except Exception:  # noqa: BLE001 - a model that is bound to as many tokens says so in its own way
        return
    far = far_from_model(program, longer, expected)
    if far <= (HALF if program.host.dtype != torch.float32 else EXACT):
        return
    what = "they do not run" if math.isinf(far) else f"their logits are {far:.2g} of the spread off"
    raise CaptureError(
        f"the traced graphs do not hold for prompts of other lengths: with {count} tokens, {what}",
        where=f"{prefill.owner}{_line(prefill)}",
        do="report this family: its code loops over parts of a prompt, or branches on its length",
    )


def first_refused(graph: Graph) -> int | None:
    """The first of LENGTHS, above that of the traced prompt, that a guard of the exporter refuses; None for none."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    size = inputs[graph.inputs.index(EMBEDDINGS)].meta["val"].shape[1]
    if not isinstance(size, torch.SymInt):
        return LENGTHS[0]
    shapes: Any = size.node.shape_env
    tokens = shapes.replace(size.node.expr)
    if not tokens.is_Symbol:
        return None
    guards = [shapes.replace(guard.expr) for guard in shapes.guards]
    values = {symbol: value for symbol, value in shapes.backed_var_to_val.items() if symbol != tokens}
    of_tokens = [guard.subs(values) for guard in guards if tokens in guard.free_symbols]
    longer = [length for length in LENGTHS if length > size.node.hint]
    return next((length for length in longer if sympy.false in [each.subs(tokens, length) for each in of_tokens]), None)


def _repeated(value: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of i64[B, S] repeated, from the last one on, to as many as asked."""
    return value[:, torch.arange(-count, 0) % value.shape[1]]


def _line(graph: Graph) -> str:
    """The line that first divides a size, where a prompt is taken apart."""
    for node in graph.nodes:
        if node.target in (operator.mod, operator.floordiv) and (trace := node.meta.get("stack_trace")):
            return f", {trace.strip().splitlines()[-1].strip()}"
    return ""
