"""Program verifier: the invariants of each stage, checked after every pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from qpcompile.errors import InvariantError, KernelError
from qpcompile.ir.code_bits import other_bits
from qpcompile.ir.edit import aten, get_tensor, map_nodes
from qpcompile.ir.names import CACHE, STATE
from qpcompile.ir.operators import RULES, SPECS
from qpcompile.ir.overloads import is_overload
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.size_functions import SIZE_FUNCTIONS
from qpcompile.kernels.rule_text import NAMES
from qpcompile.kernels.rules import Rule, described, differ
from qpcompile.nested import is_list
from qpcompile.stages import STAGES, Stage, span, within

# torch's operators that tracing leaves behind; `canonicalize` removes them.
_LEFTOVERS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
)
# The stages at which an operator is legal, both included; at all stages without an entry.
LEGAL: dict[object, tuple[Stage, Stage]] = {
    **dict.fromkeys(_LEFTOVERS, ("captured", "captured")),
    **{spec.overload: (spec.since, spec.until) for spec in SPECS},
}


def verify(program: Program) -> None:
    """Check every graph against the rules of the program's stage.

    Raises InvariantError naming the pass that has just run and the passes before it, with the graph's name.
    """
    for problem in problems(program):
        ran = program.history[-1] if program.history else "capture"
        raise InvariantError(problem, ran=ran, before=program.history[:-1], do="report this as a defect of the pass")


def problems(program: Program) -> Iterator[str]:
    """Every violated invariant, as text."""
    for name in (PREFILL, DECODE):
        if name not in program.graphs:
            yield f"the program has no {name} graph"
    for graph in program.graphs.values():
        yield from (f"{graph.name}: {text}" for text in _stage_problems(graph, program.stage))
        yield from (f"{graph.name}: {text}" for text in (*_graph_problems(graph), *other_bits(graph)))
    yield from _cache_problems(program)


def _graph_problems(graph: Graph) -> Iterator[str]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (values,) = graph.output_node.args
    if len(placeholders) != len(graph.inputs):
        yield f"{len(placeholders)} placeholders for {len(graph.inputs)} inputs"
    if not isinstance(values, tuple) or len(values) != len(graph.outputs):
        yield f"the output node does not return the {len(graph.outputs)} outputs"
    for node in graph.nodes:
        yield from _node_problems(graph, node)


def _stage_problems(graph: Graph, stage: Stage) -> Iterator[str]:
    for node in graph.nodes:
        first, last = LEGAL.get(node.target, (STAGES[0], STAGES[-1]))
        if node.op == "call_function" and not within(stage, first, last):
            yield f"{node.name} calls {node.target} at the stage {stage}; it is legal at {span(first, last)}"


def _node_problems(graph: Graph, node: fx.Node) -> Iterator[str]:
    if node.op == "get_attr":
        try:
            tensor = get_tensor(graph.module, str(node.target))
        except AttributeError:
            yield f"{node.name} reads the tensor {node.target}, which is not there"
        else:
            known = node.meta.get("val")
            if isinstance(known, torch.Tensor) and (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                yield f"{node.name} is known as {described(known)}, the tensor {node.target} is {described(tensor)}"
    elif node.op == "call_function":
        if not is_overload(node.target) and node.target not in SIZE_FUNCTIONS:
            yield f"{node.name} calls {node.target}, which is not an operator"
        if "val" not in node.meta and node.target is not operator.getitem and node.users:
            yield f"{node.name} has no shape"
        elif (rule := RULES.get(node.target)) is not None:
            yield from _operand_problems(node, rule)
    elif node.op not in ("placeholder", "output"):
        yield f"{node.name} is a {node.op} node"


def _operand_problems(node: fx.Node, rule: Rule) -> Iterator[str]:
    """Violations of an operator's rule by one call: its operands, and its recorded results."""
    args, kwargs = map_nodes((node.args, node.kwargs), lambda each: each.meta.get("val"))
    try:
        results = rule.results(*rule.arguments(args, kwargs))
    except KernelError as error:
        yield f"{node.name}, {error.where}: {error.what}"
        return
    values = node.meta.get("val")
    known = values if is_list(values) else (values,)
    for value, (dtype, sizes) in zip(known, results, strict=False):
        if isinstance(value, torch.Tensor) and (
            value.dtype != dtype or len(value.shape) != len(sizes) or any(map(differ, value.shape, sizes))
        ):
            yield f"{node.name} is known as {described(value)}, {rule.name} gives {NAMES[dtype]}{list(sizes)}"


def _cache_problems(program: Program) -> Iterator[str]:
    """The cache that prefill returns must be the one that decode takes and returns."""
    prefill, decode = program.graphs.get(PREFILL), program.graphs.get(DECODE)
    if prefill is None or decode is None:
        return
    left, taken, kept = (
        {name for name in names if name.root in (CACHE, STATE)}
        for names in (prefill.outputs, decode.inputs, decode.outputs)
    )
    if left != taken or left != kept:
        yield f"prefill and decode disagree on the cache: {sorted(left ^ taken) or sorted(left ^ kept)}"
