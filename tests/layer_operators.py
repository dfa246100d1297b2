"""The operators of a decoder layer on codes, without views."""

from __future__ import annotations

from collections import Counter
from operator import getitem

from qpcompile.ir.edit import layer_of
from qpcompile.ir.program import Graph
from qpcompile.ir.text import target_text

LAYER = Counter(rmsnorm_quantize=2, activation_quantize=1, linear_int=4)
"""Operators of a decoder layer of every preset with integer products; the others are attention's."""
PROMPT = Counter(rope_kv_write=1, attention_kv=1, transform_quantize=1)
"""Attention's in prefill: rotary embedding, rotation and codes; attention; quantizer. A layer has ten operators."""
PLAIN_PROMPT = PROMPT - Counter(transform_quantize=1) + Counter(quantize_dynamic=1)
"""The same without a change of basis."""
STEP = Counter(attention_step=1)
"""All of these in decode, and the append to the cache. A layer has eight operators."""
VIEWS = {"view", "reshape", "transpose", "unsqueeze", "expand", "contiguous", "slice", "sym_size", "getitem"}


def operators(graph: Graph) -> Counter[str]:
    """The operators of the decoder layer with the fewest, which has no cut before it; without views."""
    layers: dict[int, Counter[str]] = {}
    for node in graph.nodes:
        layer, name = layer_of(node), target_text(node.target).split("::")[-1].split(".")[0]
        if node.op == "call_function" and layer is not None and name not in VIEWS and node.target is not getitem:
            layers.setdefault(layer, Counter())[name] += 1
    return min(layers.values(), key=Counter.total)
