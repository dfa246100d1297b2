"""States that a decoder reads through cross-attention: rows of pictures outside its prompt, which may be cut too.

    prefill   encoder_hidden_states : f[B, V, C]       the states; of several pictures, f[B * pictures, P, C]
              encoder_attention_mask : i64[B, V]       beside them: an entry for each state
    cached    past_states.0.cross.key : f[B, H, V, D]

A graph reads states where it caches keys that decoding does not append to (qpcompile/capture/capture.py), or where keys
come from the inputs of pictures alone and are computed in every step:

    prefill   view(tower of %pixel_values) : f[B, V, C]         decode   view(%image_encoder_embeddings) : f[B, V, C]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, calls, is_call, layer_of
from qpcompile.ir.names import CROSS, STATE, Name
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.ir.shapes import expression, same, value
from qpcompile.pruning.pruner import INPUT, Schedule, StatesCutter
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.prepare import EMBEDDINGS, PROMPT, STATES_OF


@dataclass(frozen=True)
class Inner:
    """States that a graph computes, `rows: f[B, V, C]`.

    attention: the nodes over them. readers: what reads them for keys and values. sizes: nodes on the way to these that
    read V, and the size that they read.
    """

    rows: fx.Node
    attention: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    sizes: tuple[tuple[fx.Node, fx.Node], ...]


@dataclass(frozen=True)
class States:
    """The states of a prefill graph: the input `path: f[rows, P, C]`, or what is computed from it.

    layer: the first layer that reads them; key: its keys, f[B, H, V, D]; of: PICTURES or PROMPT; inner: where every
    step computes keys from them.
    """

    path: Name
    layer: int
    key: fx.Node
    of: str
    inner: Inner | None = None

    @property
    def words(self) -> str:
        """What is cut, in words."""
        return str(self.path) if self.inner is None else f"what the decoder makes of {self.path}"

    @property
    def count(self) -> Any:
        """V, a size."""
        return value(self.key).shape[2]

    @property
    def linear(self) -> fx.Node:
        """What computes the keys from the states."""
        before = needed_for_tensors(self.inner.rows) if self.inner is not None else set[fx.Node]()
        found = [node for node in needed_for_tensors(self.key) - before if is_call(node, aten.linear.default)]
        if len(found) != 1:
            raise PlanError(f"{len(found)} linears compute the keys of layer {self.layer}", where=self.path)
        return found[0]


def cached_keys(paths: Iterable[Name]) -> list[Name]:
    """The names of keys that cross-attention caches, first layer first."""
    found = [path for path in paths if path.root == STATE and path.part == f"{CROSS}.key"]
    return sorted(found, key=lambda path: path.layer)


def states_input(graph: Graph) -> Name | None:
    """The one input f[rows, P, C] of a prefill graph that all keys of cross-attention come from; None if none is."""
    named = {graph.placeholder(path): path for path in graph.inputs}
    keys = [graph.result(path) for path in cached_keys(graph.outputs)]
    sources = {node for key in keys for node in needed_for_tensors(key) if node in named}
    found = {node for node in sources if value(node).is_floating_point() and named[node] != EMBEDDINGS}
    only = found.pop() if len(found) == 1 else None
    return named[only] if only is not None and value(only).ndim == 3 else None


def needed_for_tensors(node: fx.Node) -> set[fx.Node]:
    """All tensors that a tensor is computed from, itself included."""
    found, waiting = {node}, [node]
    while waiting:
        new = {each for each in waiting.pop().all_input_nodes if _is_tensor(each)} - found
        found |= new
        waiting += new
    return found


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.SymInt, int))


def find_states(graph: Graph) -> States | None:
    """The states that a prefill graph reads; None if it has no cross-attention with cached keys.

    Raises PlanError where it has, and its states cannot be cut.
    """
    keys = cached_keys(graph.outputs)
    if not keys:
        inner = find_inner(graph) if STATES_OF in graph.constants else None
        if inner is None:
            return None
        key = read_attention(inner.attention[0]).key
        found = States(inner_sources(graph, inner)[0], 0, key, str(graph.constants[STATES_OF]), inner)
        return _checked(graph, found)
    path = states_input(graph)
    if path is None:
        raise _cannot(graph, "it does not come from one input f[rows, P, C]")
    if STATES_OF not in graph.constants:
        raise _cannot(graph, f"which rows of {path} are of pictures is not known")
    return _checked(graph, States(path, keys[0].layer, graph.result(keys[0]), str(graph.constants[STATES_OF])))


def _checked(graph: Graph, found: States) -> States:
    """The states, if their number may change, and nothing but masks depends on the place of one among the others."""
    if not isinstance(found.count, torch.SymInt):
        raise _cannot(graph, f"the graph was traced for {found.count} rows of {found.path} only")
    if counted := _counted(graph, found):
        raise _cannot(graph, f"{counted.name} depends on the place of a row in {found.path}, which a cut changes")
    return found


def find_inner(graph: Graph) -> Inner | None:
    """The states that a graph computes itself, and keys and values from them in every step; None if there are none.

    Attention is over them if its queries come from the prompt, and its keys from neither the prompt nor a cache.
    """
    inside = {
        graph.placeholder(path) for path in graph.inputs if path == EMBEDDINGS or path.in_cache or path.root == STATE
    }
    for node in graph.nodes:
        if _is_tensor(node) and any(source in inside for source in node.all_input_nodes):
            inside.add(node)
    found: list[fx.Node] = []
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        read = read_attention(node)
        if read.query in inside and not {read.key, read.value} & inside:
            found.append(node)
    reads = [read_attention(node) for node in found]
    cones = [needed_for_tensors(read.key) | needed_for_tensors(read.value) for read in reads]
    common = set[fx.Node].intersection(*cones) if cones else set[fx.Node]()
    rows = next((node for node in reversed(graph.nodes) if node in common and _is_rows(graph, node, found)), None)
    if rows is None:
        return None
    after = set[fx.Node]().union(*cones) - needed_for_tensors(rows)
    count = value(rows).shape[1]
    sizes = [(node, size) for node in after for size in node.all_input_nodes if _is_size(size, count)]
    return Inner(rows, tuple(found), tuple(node for node in rows.users if node in after), tuple(sizes))


def inner_sources(graph: Graph, inner: Inner) -> list[Name]:
    """The floating-point inputs that states are computed from."""
    needed = needed_for_tensors(inner.rows)
    nodes = [(path, graph.placeholder(path)) for path in graph.inputs]
    return [path for path, node in nodes if node in needed and value(node).is_floating_point()]


def _is_rows(graph: Graph, node: fx.Node, attention: Sequence[fx.Node]) -> bool:
    """Whether a tensor is f[B, V, C], of as many states as each attention node has keys, and as the model computes it.

    Changes of basis and stubs belong to the linears after them.
    """
    tensor, batch = value(node), value(graph.placeholder(EMBEDDINGS)).shape[0]
    ours = getattr(node.target, "namespace", "") == "qpcompile"
    if node.op != "call_function" or ours or not isinstance(tensor, torch.Tensor) or tensor.ndim != 3:
        return False
    counts = [value(read_attention(each).key).shape[2] for each in attention]
    return same(tensor.shape[0], batch) and all(same(tensor.shape[1], count) for count in counts)


def _is_size(node: fx.Node, count: Any) -> bool:
    size = node.meta.get("val")
    return isinstance(size, torch.SymInt) and same(size, count)


def _counted(graph: Graph, states: States) -> fx.Node | None:
    """A node that makes keys, values or biases of attention depend on the numbers of states, if there is one.

    A mask is indexed by numbers too: those of its own entries, which are cut with the states.
    """
    made = [graph.result(path) for path in graph.outputs if path.root == STATE and path.part.startswith(CROSS)]
    before = set[fx.Node]()
    if states.inner is not None:
        reads = [read_attention(node) for node in states.inner.attention]
        made = [node for read in reads for node in (read.key, read.value)]
        # A tower numbers its patches: that is part of the states.
        before = needed_for_tensors(states.inner.rows)
    for node in {each for result in made for each in needed_for_tensors(result)} - before:
        if node.op == "call_function" and _has_axis(node, states.count) and len(needed_for_tensors(node)) == 1:
            return node
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        read = read_attention(node)
        if read.mask is not None and same(value(read.key).shape[2], states.count):
            for each in needed_for_tensors(read.mask):
                if is_call(each, aten.embedding.default) and _has_axis(each, states.count):
                    return each
    return None


def _has_axis(node: fx.Node, size: Any) -> bool:
    tensor = value(node)
    return isinstance(tensor, torch.Tensor) and any(same(each, size) for each in tensor.shape)


def entries(graph: Graph, lengths: Iterable[Any]) -> list[tuple[Name, int]]:
    """The inputs, other than caches and states, with an entry for each state, and the axis of it.

    lengths: the sizes that count states. A mask that is given to attention over them counts them too, though a trace
    may have another symbol for it.
    """
    sizes = {expression(length) for length in lengths}
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        read = read_attention(node)
        if read.mask is not None and expression(value(read.key).shape[2]) in sizes:
            sizes.add(expression(value(read.mask).shape[-1]))
    return [
        (path, axis)
        for path in graph.inputs
        if path.root != STATE and not path.in_cache
        for axis, size in enumerate(value(graph.placeholder(path)).shape)
        if isinstance(size, torch.SymInt) and expression(size) in sizes
    ]


def attention_over(graph: Graph, states: States) -> fx.Node | None:
    """The attention of the first layer that reads states; None if it has another form."""
    if states.inner is not None:
        return states.inner.attention[0]
    found = [node for node in calls(graph, aten.scaled_dot_product_attention.default) if layer_of(node) == states.layer]
    over = [node for node in found if same(value(read_attention(node).key).shape[2], states.count)]
    return over[0] if len(over) == 1 else None


def states_schedule(program: Program, states: States) -> Schedule:
    """One cut of all states, before the decoder; raises PlanError for a method that has no score for them."""
    graph, recipe = program.graphs[PREFILL], program.recipe
    attention = attention_over(graph, states) is not None
    left_out = states_cutter(recipe, states).left_out(recipe, states.of == PROMPT, attention)
    once = f"layers: none has visual tokens of its own; {states.words} is cut once, before all of them"
    return Schedule((INPUT,), lambda keep: (keep,), waived=(once, *left_out))


def states_cutter(recipe: Recipe, states: States) -> StatesCutter:
    """The recipe's method, if it can score states; PlanError if not."""
    method = PRUNERS[recipe.tokens.method]
    if isinstance(method, StatesCutter):
        return method
    able = ", ".join(name for name, each in PRUNERS.items() if isinstance(each, StatesCutter))
    raise PlanError(
        f"the visual tokens of this model are {states.words}, outside the decoder's prompt, and {recipe.tokens.method} "
        "cannot score them",
        where="tokens.method",
        do=f"choose one of {able}",
    )


def check_states(program: Program) -> None:
    """Raise PlanError for a recipe that cannot cut the states that this program's decoder reads, before any pass."""
    if program.recipe.tokens.method != "none" and (states := find_states(program.graphs[PREFILL])):
        states_schedule(program, states)


def _cannot(graph: Graph, reason: str) -> PlanError:
    return PlanError(
        f"what this decoder reads through cross-attention cannot be cut: {reason}",
        where=f"{graph.name}, tokens.method",
        do="write tokens.method none",
    )
