"""The operators of a decoder layer on 4-bit codes, without views."""

from __future__ import annotations

from collections import Counter
from operator import getitem

from qpcompile.ir.edit import layer_of
from qpcompile.ir.program import Graph
from qpcompile.ir.text import target_text

LAYER = Counter(
    rmsnorm_quantize=2,
    activation_quantize=1,
    transform_quantize=1,
    linear_int=4,
    attention_kv4=1,
)
"""Operators of a decoder layer of every W4A4 preset, with one for the cache: rotary embedding, rotation, codes."""
PROMPT, STEP = Counter(rope_kv4_write=1), Counter(rope_kv4_append=1)
"""The operator for the cache in prefill and in decode. A layer has ten operators."""
_CACHE_OF_8 = (
    LAYER
    - Counter(transform_quantize=1, attention_kv4=1)
    + Counter(quantize_dynamic=1, rope=2, hadamard=2, kv8_write=2, kv8_read=2, scaled_dot_product_attention=1)
)
OPERATORS = {4: (LAYER + PROMPT, LAYER + STEP), 8: (_CACHE_OF_8, _CACHE_OF_8 + Counter(cat=4))}
"""(prefill, decode) by the bits of the cache. One of 8 bits is read by torch's attention, and appended to by cat."""
VIEWS = {"view", "reshape", "transpose", "unsqueeze", "expand", "contiguous", "slice", "sym_size", "getitem"}


def operators(graph: Graph) -> Counter[str]:
    """The operators of the decoder layer with the fewest, which has no cut before it; without views."""
    layers: dict[int, Counter[str]] = {}
    for node in graph.nodes:
        layer, name = layer_of(node), target_text(node.target).split("::")[-1].split(".")[0]
        if node.op == "call_function" and layer is not None and name not in VIEWS and node.target is not getitem:
            layers.setdefault(layer, Counter())[name] += 1
    return min(layers.values(), key=Counter.total)
