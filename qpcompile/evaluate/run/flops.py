"""Floating-point operations of one prompt: tower and projector counted as they run, the decoder by formula.

    F = F_tower + F_projector + sum over decoder layers l of C(S_l),   S_l = text tokens + visual tokens in layer l
    C(S) = 2 S (2 d a + 2 d k + 3 d m) + 4 S^2 a

d hidden width, a = heads x head width, k = KV heads x head width, m MLP width; a multiplication and an addition are two
operations; norms, rotary positions and the head are left out. integer products count like others.

Source: "QUOTA" (arXiv 2604.17320), equations 10 to 13; C is the usual count for a gated MLP, which gives the 40.89 %
that the paper prints for its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from qpcompile.ir.operators import (
    EXPERT_LINEAR,
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    LINEAR_INT,
    LINEAR_W4A16,
    LINEAR_W8A16,
)
from qpcompile.ir.program import PROJECTOR, VISION, Graph, Program, component_of
from qpcompile.runtime.machine import Machine, execute_graph


@dataclass(frozen=True)
class Decoder:
    """The widths that determine the cost of a decoder layer."""

    hidden: int
    attention: int
    cache: int
    mlp: int

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """From the configuration of a transformers model."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        cached = getattr(text, "num_key_value_heads", None) or heads
        return cls(text.hidden_size, heads * width, cached * width, text.intermediate_size)

    def layer(self, tokens: int) -> int:
        """C(S): operations of one layer on `tokens` tokens."""
        projections = 2 * self.hidden * self.attention + 2 * self.hidden * self.cache + 3 * self.hidden * self.mlp
        return 2 * tokens * projections + 4 * tokens**2 * self.attention

    def prompt(self, visual: Sequence[int], text: int) -> int:
        """All layers: visual[l] visual tokens in layer l, `text` text tokens in each."""
        return sum(self.layer(count + text) for count in visual)


def picture_flops(program: Program, inputs: dict[str, Any]) -> int:
    """Operations of the tower and the projector on the pictures of `inputs`, counted while they run.

    Elementwise operators and softmax are left out. The host is unbound afterwards, so pass a copy of a program
    that is in use.
    """
    total = 0

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal total
        if component_of(graph.name) not in (VISION, PROJECTOR):
            return execute_graph(graph, feeds)
        with FlopCounterMode(display=False, custom_mapping=dict(OURS)) as counter:
            results = execute_graph(graph, feeds)
        total += counter.get_total_flops()
        return results

    with Machine(program, execute) as machine:
        machine.prefill(inputs)
    return total


def _attention(query: Sequence[int], key: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of [S, D] with [D, K] per head; shapes [B, H, S, D] and [B, H, K, D]."""
    return 4 * math.prod(query) * key[2]


def _linear(codes: Sequence[int], _: Any, weight: Sequence[int], *__: Any, out_shape: Any = None) -> int:
    """codes [..., K], weight [N, K], or [N, ceil(K / 2)] if it is packed."""
    return 2 * math.prod(codes) * weight[0]


def _linear_on_floats(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None) -> int:
    return 2 * math.prod(x) * weight[0]


def _expert_linear(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """x: [N, I, K] -> [N, J, O]: one product per slot."""
    return 2 * math.prod(out_shape) * x[-1]


# Operators missing in PyTorch's counter: attention on the CPU, and our linears.
OURS = (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention),
    (LINEAR_INT.overloadpacket, _linear),
    (LINEAR_W4A16.overloadpacket, _linear_on_floats),
    (LINEAR_W8A16.overloadpacket, _linear_on_floats),
    *((each.overloadpacket, _expert_linear) for each in (EXPERT_LINEAR, EXPERT_LINEAR_INT, EXPERT_LINEAR_A16)),
)
