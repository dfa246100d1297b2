"""Static activation scales from calibration, one per modality, and their per-token selection in the graph.

    scale_m = r max|x| / h over calibration tokens of modality m;  r by search if the recipe asks, else 1

Prefill selects by the visual mask, carried through token cuts; the tower and the projector see visual tokens only, and
decode text only.

Source: "MQuant" (arXiv 2502.00425), section 3.2; the search is ours.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.ir.edit import add_tensor, aten, call, is_call
from qpcompile.ir.operators import SELECT_TOKENS
from qpcompile.ir.program import DECODE, PREFILL, Graph
from qpcompile.ir.shapes import add_input, same, value
from qpcompile.kernels.quantize_dynamic.reference import code_range, highest
from qpcompile.recipe.quantize import ActivationScheme
from qpcompile.runtime.machine import VISUAL

RATIOS = tuple(1 - 0.03 * step for step in range(25))


def static_scales(statistics: InputStatistics, weights: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """weights: f[N, C] of the linears -> f32[2] on the CPU, visual and text tokens; one replaces a missing other."""
    gram = weights.float().T @ weights.float()
    visual, text = statistics.rows[statistics.visual], statistics.rows[~statistics.visual]
    found = [_scale(rows if len(rows) else statistics.rows, gram, scheme) for rows in (visual, text)]
    return torch.tensor(found, dtype=torch.float32)


def _scale(rows: torch.Tensor, gram: torch.Tensor, scheme: ActivationScheme) -> float:
    full = float(rows.abs().max()) / highest(scheme.bits) if rows.numel() else 0.0
    if full == 0.0:
        return 1.0
    if not scheme.clip_search:
        return full

    def cost(ratio: float) -> float:
        scale = full * ratio
        error = (rows / scale).round().clamp(*code_range(scheme.bits)) * scale - rows
        return float(((error @ gram) * error).sum())

    return full * min(RATIOS, key=cost)


def select_scale(graph: Graph, stub: fx.Node, scales: torch.Tensor, name: str) -> fx.Node:
    """The scale of each token of a stubbed input: f32[1] if all tokens have one modality, else f32[B, S, 1]."""
    mask = visual_mask(graph, stub) if graph.name == PREFILL else None
    if mask is None:
        kind = 1 if graph.name == DECODE else 0
        return add_tensor(graph, f"static.{name}", scales[kind : kind + 1].clone(), stub)
    visual = add_tensor(graph, f"static.{name}_visual", scales[:1].clone(), stub)
    text = add_tensor(graph, f"static.{name}_text", scales[1:].clone(), stub)
    wide = call(graph, stub, aten.unsqueeze.default, mask, -1)
    shape = value(stub).shape
    if not same(shape[0], value(mask).shape[0]):
        wide = call(graph, stub, aten.reshape.default, wide, [-1, *[1] * (len(shape) - 1)])
        wide = call(graph, stub, aten.expand.default, wide, [-1, *shape[1:-1], 1])
    return call(graph, stub, aten.where.self, wide, visual, text)


def visual_mask(graph: Graph, stub: fx.Node) -> fx.Node | None:
    """Which tokens are visual at the stub, bool[B, N]; None if its tokens are not the prompt's."""
    if VISUAL in graph.inputs:
        mask = graph.placeholder(VISUAL)
    else:
        embeddings = value(graph.placeholder("inputs_embeds"))
        mask = add_input(graph, VISUAL, (embeddings.shape[0], embeddings.shape[1]), torch.bool)
    for node in graph.nodes:
        if node is stub:
            break
        if is_call(node, SELECT_TOKENS):
            mask = _kept(graph, node, mask)
    shape, size = value(stub).shape, value(mask).shape
    # Layers of experts flatten the tokens: [B S, C], or [B S, I, C].
    flat = same(shape[0], size[0] * size[1])
    return mask if flat or (len(shape) == 3 and same(shape[1], size[1])) else None


def _kept(graph: Graph, select: fx.Node, mask: fx.Node) -> fx.Node:
    """The mask after a cut; created once."""
    index = next(user for user in select.users if user.target is operator.getitem and user.args[1] == 0)
    for user in mask.users:
        if is_call(user, aten.gather.default) and user.args == (mask, 1, index):
            return user
    return call(graph, index.next, aten.gather.default, mask, 1, index)
