"""What dropping one token after a layer costs, to first order, from one backward pass in full precision.

    L        - log odds of the answer's tokens, summed
    g_i      multiplies exp(score) of key i in the attention of one layer: 1 keeps the token, 0 drops it
    dL/dg_i  = sum over heads and queries of A[q, i] (<dL/do_q, v_i> - <dL/do_q, o_q>)
    cost_i   = - sum over later layers of dL/dg_i

o = A v is the attention's output. Log odds, not log probabilities, whose gradients vanish where the model is certain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpcompile.calibration.blocks import run_nodes
from qpcompile.ir.attention import Attention, read_attention
from qpcompile.ir.edit import aten, calls, layer_of
from qpcompile.ir.program import Graph
from qpcompile.kernels.attention_kv.masking import masked_softmax
from qpcompile.runtime.placement import Placement


def drop_costs(
    prefill: Graph,
    head: Graph | None,
    feeds: dict[str, torch.Tensor],
    answer: torch.Tensor,
    counted: torch.Tensor,
    on: Placement,
) -> dict[int, torch.Tensor]:
    """Layer -> f32[B, S]: the cost of dropping each token after it, for all layers with attention but the last.

    feeds: prefill inputs of prompt and answer without its last token. answer: i64[B, T], the last T rows predict it.
    counted: bool[B, T], which of them count. The backward pass reads all weights: on an accelerator the whole decoder
    must fit.
    """
    attentions = {
        node: (layer, read_attention(node))
        for node in calls(prefill, aten.scaled_dot_product_attention.default)
        if (layer := layer_of(node)) is not None
    }
    wanted = {each for _, read in attentions.values() for each in _operands(read)}
    seen: dict[fx.Node, Any] = {}
    for node, name in zip((n for n in prefill.nodes if n.op == "placeholder"), prefill.inputs, strict=True):
        if node in wanted:
            seen[node] = feeds[name]

    def look(node: fx.Node, value: Any) -> Any:
        if node in attentions:
            value.retain_grad()
        if node in attentions or node in wanted:
            seen[node] = value
        return value

    with torch.enable_grad():
        given = {name: feed.detach() for name, feed in on.there(feeds).items()}
        given["inputs_embeds"].requires_grad_()
        rows = next(iter(run_nodes(prefill, given, on, look).values()))[:, -answer.shape[1] :]
        if head is not None:
            (name,) = head.inputs
            rows = next(iter(run_nodes(head, {name: rows}, on, None).values()))
        _odds(rows.float(), on.there(answer))[on.there(counted)].sum().neg().backward()
    costs: dict[int, torch.Tensor] = {}
    later: torch.Tensor | None = None
    with torch.no_grad():
        for node, (layer, read) in sorted(attentions.items(), key=lambda pair: -pair[1][0]):
            if later is not None:
                costs[layer] = on.back(later)
            own = -_gate_gradient(read, seen[node], seen)
            later = own if later is None else later + own
    return costs


def _operands(read: Attention) -> list[fx.Node]:
    return [node for node in (read.query, read.key, read.value, read.mask) if node is not None]


def _odds(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """logits: f32[B, T, V], answer: i64[B, T] -> log odds of its tokens, f32[B, T]."""
    own = logits.gather(-1, answer[..., None])
    others = logits.scatter(-1, answer[..., None], -torch.inf).logsumexp(-1)
    return own[..., 0] - others


def _gate_gradient(read: Attention, output: torch.Tensor, seen: dict[fx.Node, Any]) -> torch.Tensor:
    """dL/dg of each key, f32[B, S]."""
    query, key, held = (seen[node].detach().float() for node in (read.query, read.key, read.value))
    repeats = query.shape[1] // key.shape[1]
    key, held = key.repeat_interleave(repeats, dim=1), held.repeat_interleave(repeats, dim=1)
    mask = None if read.mask is None else seen[read.mask]
    if mask is None and read.causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    assert output.grad is not None
    slope = output.grad.float()
    weights = masked_softmax(query @ key.mT * read.scale, mask)
    gains = slope @ held.mT - (slope * output.detach().float()).sum(-1, keepdim=True)
    return (weights * gains).sum(dim=(1, 2))
