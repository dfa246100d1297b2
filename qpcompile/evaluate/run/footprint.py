"""Memory footprint of a compiled model: bytes of the decoder's linear weights and of the cache of one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpcompile.ir.edit import aten, get_tensor
from qpcompile.ir.operators import (
    EXPERT_LINEAR,
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    LINEAR_INT,
    LINEAR_W4A16,
    LINEAR_W8A16,
)
from qpcompile.ir.program import PREFILL, Program
from qpcompile.ir.structure import CACHE_ARGUMENT

LINEARS = (
    *(aten.linear.default, LINEAR_INT, LINEAR_W4A16, LINEAR_W8A16),
    *(EXPERT_LINEAR, EXPERT_LINEAR_INT, EXPERT_LINEAR_A16),
)


def decoder_linear_bytes(program: Program) -> int:
    """Bytes of all weights, scales and biases that the decoder's linears read, each counted once."""
    graph = program.graphs[PREFILL]
    linears = [node for node in graph.nodes if node.op == "call_function" and node.target in LINEARS]
    read = {str(source.target) for node in linears for source in node.all_input_nodes if source.op == "get_attr"}
    for node in linears:
        read |= _behind_casts(node)
    return sum(get_tensor(graph.module, name).nbytes for name in read)


def _behind_casts(linear: fx.Node) -> set[str]:
    """Names of weights that reach a linear through operators with one input, such as a cast or a transpose."""
    found = set()
    for source in linear.all_input_nodes[1:]:
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            found.add(str(source.target))
    return found


@dataclass(frozen=True)
class Footprint:
    """Bytes of the tensors of a transformers cache, as stored and as fp16."""

    stored: int
    fp16: int


def cache_footprint(generate: Callable[..., Any], inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Footprint:
    """The cache size of a transformers model at the end of one answer."""
    answer = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
    tensors = [tensor for layer in answer[CACHE_ARGUMENT].layers for tensor in (layer.keys, layer.values)]
    return Footprint(sum(tensor.nbytes for tensor in tensors), sum(2 * tensor.numel() for tensor in tensors))
