"""Pass per-token data of the vision tower to the decoder: attention received, and keys.

    vision    ... %q, %k of the last attention layer that the visual tokens come from
                %s = qpcompile::attention_received(%q, %k, ...)  and the mean of %k over heads
                both without the rows that the model drops, and reordered like the patches
              return visual_scores f32[N], visual_keys f[N, K]
    prefill   input visual_scores f32[B, S], visual_keys f[B, S, K]: the same at the places of visual tokens

The nodes read the deployed tower's values, so a quantized tower scores with its own queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, call, is_call
from qpcompile.ir.operators import ATTENTION_RECEIVED, SEGMENT_ATTENTION
from qpcompile.ir.program import PREFILL, PROJECTOR, VISION, Graph, Program
from qpcompile.ir.shapes import add_input, add_output, same, value
from qpcompile.pruning.visual_rows import OUTPUT, SKIPPED, follow_rows
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES

END = 2**63 - 1
INSTEAD = "choose a tokens.method that does not read the vision tower: quota, random"


def add_tower_outputs(program: Program, *, joined_heads: bool) -> None:
    """Add both outputs to the vision graph and both inputs to the prefill graph.

    joined_heads: treat all heads as one concatenated head, with concatenated keys; else one softmax per head, and the
    mean over heads of both. Raises PlanError if the tower's attention cannot be found, or its patches cannot be traced
    to the visual tokens.
    """
    vision = program.graphs.get(VISION)
    if vision is None:
        raise PlanError("the vision tower is not a graph of this program", where=VISION, do=INSTEAD)
    if OUTPUT not in vision.constants:
        raise PlanError(
            f"{type(program.host).__name__} does more with patches than to project them into the sequence",
            where=VISION,
            do=INSTEAD,
        )
    used, skipped = vision.result(vision.constants[OUTPUT]), int(vision.constants[SKIPPED])
    if projector := program.graphs.get(PROJECTOR):
        _check_projector(projector)
    class_token = skipped > 0 and program.recipe.tokens.tower_queries == "class_token"
    node, linear = _last_attention(vision, used)
    heads = _read(vision, node, joined_heads)
    _check_rows(vision, node, linear)
    table = follow_rows(vision, linear, used)
    before = vision.output_node
    scores = call(vision, before, ATTENTION_RECEIVED, heads.query, heads.key, heads.segments, heads.scale, class_token)
    keys = call(vision, before, aten.mean.dim, heads.key, [1])
    for path, rows in ((VISUAL_SCORES, scores), (VISUAL_KEYS, keys)):
        add_output(vision, path, _at_tokens(vision, rows, table, skipped))
    vision.module.recompile()
    _add_inputs(program.graphs[PREFILL], keys)


@dataclass(frozen=True)
class _Heads:
    """query: f[B, Hq, T, D], key: f[B, Hkv, T, D]; segments: the cumulative lengths of a packed row, or None."""

    query: fx.Node
    key: fx.Node
    segments: fx.Node | None
    scale: float


def _last_attention(vision: Graph, used: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The last attention node that `used` is computed from, and the linear after it."""
    before, waiting = {used}, [used]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - before
        before |= new
        waiting += new
    attends = (aten.scaled_dot_product_attention.default, SEGMENT_ATTENTION)
    found = [node for node in vision.nodes if node in before and is_call(node, *attends)]
    if not found:
        raise PlanError("the vision tower has no attention layer that can be found", where=VISION, do=INSTEAD)
    reached = {found[-1]}
    for node in vision.nodes:
        if reached & set(node.all_input_nodes):
            reached.add(node)
            if is_call(node, aten.linear.default):
                return found[-1], node
    raise PlanError("no linear follows the vision tower's last attention", where=VISION, do=INSTEAD)


def _read(vision: Graph, node: fx.Node, joined: bool) -> _Heads:
    """The operands of an attention node; with `joined`, queries and keys of all heads are concatenated to one."""
    if node.target is SEGMENT_ATTENTION:
        query, key, _, segments, scale = node.args
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(segments, fx.Node)
        heads = _Heads(query, key, segments, float(scale))  # type: ignore[arg-type]
    else:
        found = read_attention(node)
        if found.mask is not None or found.causal:
            raise PlanError(
                "the vision tower's last attention hides some patches from others",
                where=f"{VISION}, {node.name}",
                do=INSTEAD,
            )
        heads = _Heads(found.query, found.key, None, found.scale)
    if not joined:
        return heads
    width = int(value(heads.query).shape[1]) * int(value(heads.query).shape[3])
    return _Heads(_joined(vision, heads.query), _joined(vision, heads.key), heads.segments, width**-0.5)


def _joined(vision: Graph, heads: fx.Node) -> fx.Node:
    """f[B, H, T, D] -> f[B, 1, T, H * D]."""
    before = vision.output_node
    side_by_side = call(vision, before, aten.transpose.int, heads, 1, 2)
    return call(
        vision, before, aten.unsqueeze.default, call(vision, before, aten.flatten.using_ints, side_by_side, 2), 1
    )


def _check_rows(vision: Graph, node: fx.Node, linear: fx.Node) -> None:
    """The linear's rows are the attention's: [B, T], or [T] of a packed row."""
    batch, _, tokens, _ = value(node).shape
    rows = value(linear).shape[:-1]
    expected = (batch, tokens) if len(rows) == 2 else (tokens,)
    if len(rows) > 2 or (len(rows) == 1 and not same(batch, 1)) or not all(map(same, rows, expected)):
        raise PlanError(
            f"attention over {tokens} patches is followed by rows {tuple(rows)}",
            where=f"{VISION}, {linear.name}",
            do=INSTEAD,
        )


def _check_projector(projector: Graph) -> None:
    """A projector must process every row independently."""
    if follow_rows(projector, projector.placeholder(projector.inputs[0]), projector.result(projector.outputs[0])):
        raise PlanError("the projector moves patches or puts several into one", where=PROJECTOR, do=INSTEAD)


def _at_tokens(vision: Graph, rows: fx.Node, table: fx.Node | None, skipped: int) -> fx.Node:
    """rows: f[B, T] or f[B, T, K] of patches -> f[N] or f[N, K] of visual tokens, a merged token being the mean."""
    before = vision.output_node
    tail = [int(value(rows).shape[2])] if value(rows).ndim == 3 else []
    if table is not None:
        flat = call(vision, before, aten.reshape.default, rows, [-1, *tail])
        parts = call(vision, before, aten.index.Tensor, flat, [table])
        rows = call(vision, before, aten.mean.dim, parts, [value(table).ndim - 1])
    if skipped:
        rows = call(vision, before, aten.slice.Tensor, rows, 1, skipped, END)
    return call(vision, before, aten.reshape.default, rows, [-1, *tail])


def _add_inputs(prefill: Graph, keys: fx.Node) -> None:
    batch, length = value(prefill.placeholder("inputs_embeds")).shape[:2]
    add_input(prefill, VISUAL_SCORES, (batch, length), torch.float32)
    add_input(prefill, VISUAL_KEYS, (batch, length, int(value(keys).shape[-1])), value(keys).dtype)
