"""Promote sums to float64 for `numerics: exact`, so that all back ends produce identical codes.

    %y = aten::layer_norm(%x, ...)      becomes      %a = aten::to.dtype(%x, f64)
                                                     %b = aten::layer_norm(%a, ...)
                                                     %y = aten::to.dtype(%b, f32)

Back ends use different summation orders. Where their float32 results differ in the last bit next to a rounding tie, a
code flips, and with it an occasional answer; kernels/sums.py has the numbers. An operator of ours computes in float64
where its rows are float64: their input is cast in the same way, and their result where it is a float. Graphs of
`numerics: fast` are left unchanged. Pruners' own arithmetic is float64 in both.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.convolutions import CONVOLUTIONS, cuts_patches
from qpcompile.ir.edit import aten, call, calls, is_call, tidy
from qpcompile.ir.numerics import check_numerics
from qpcompile.ir.operators import (
    ACTIVATION,
    ACTIVATION_QUANTIZE,
    ATTENTION_KV,
    ATTENTION_STEP,
    EXPERT_LINEAR,
    HADAMARD,
    KRONECKER,
    LAYERNORM_QUANTIZE,
    RMSNORM,
    RMSNORM_QUANTIZE,
    ROPE_KV_APPEND,
    ROPE_KV_WRITE,
    SEGMENT_ATTENTION,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.program import HEAD, Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.stages import Stage

# Reductions, and functions that math libraries approximate differently. Plain arithmetic is the same everywhere.
SUMS = (
    *(aten.linear.default, aten.addmm.default, aten.matmul.default, aten.bmm.default, aten.mm.default),
    *(*CONVOLUTIONS, aten.mean.dim, aten.layer_norm.default, RMSNORM, EXPERT_LINEAR),
    *(aten.scaled_dot_product_attention.default, SEGMENT_ATTENTION, aten.softmax.int),
)
FUNCTIONS = (
    *(aten.cos.default, aten.sin.default, aten.exp.default, aten.rsqrt.default),
    *(aten.gelu.default, aten.sigmoid.default, aten.silu.default, aten.tanh.default),
)


ROWS: dict[object, int] = {
    **dict.fromkeys((TRANSFORM_QUANTIZE, RMSNORM_QUANTIZE, LAYERNORM_QUANTIZE, HADAMARD, KRONECKER, ATTENTION_KV), 1),
    **dict.fromkeys((ACTIVATION, ACTIVATION_QUANTIZE), 2),
    **dict.fromkeys((ROPE_KV_WRITE, ROPE_KV_APPEND, ATTENTION_STEP), 3),
}
"""Operators of ours that compute in the type of their first operands, and how many those are; others keep theirs."""


@dataclass(frozen=True)
class WidenSums:
    """See the module's docstring. The head is left out: nothing is quantized after it."""

    name: ClassVar[str] = "widen_sums"
    purpose: ClassVar[str] = (
        "Promote sums to float64 for `numerics: exact`, so that all back ends produce identical codes."
    )
    needs: ClassVar[Stage] = "fused"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was promoted. Raises RecipeError for a model in half precision or on a GPU."""
        if program.recipe.numerics == "fast":
            return False
        check_numerics(program.recipe, program.host.parameters())
        changed = [_widen(graph) for name, graph in program.graphs.items() if name != HEAD]
        return any(changed)


def _widen(graph: Graph) -> bool:
    # Runtimes have no float64 for convolutions of patches that overlap.
    found = [node for node in calls(graph, *SUMS, *FUNCTIONS, *ROWS) if _is_single(node.args[0])]
    found = [node for node in found if node.target not in CONVOLUTIONS or cuts_patches(node)]
    wide: dict[fx.Node, fx.Node] = {}
    for node in found:
        count = ROWS.get(node.target, len(node.args))
        first, rest = node.args[:count], node.args[count:]
        operands = fx.map_arg((first, node.kwargs), lambda source, node=node: _wide(graph, node, source, wide))
        result = call(graph, node, node.target, *operands[0], *rest, like=node, **operands[1])
        if isinstance(value(result), torch.Tensor):
            result = call(graph, node, aten.to.dtype, result, torch.float32, like=node)
        else:
            _narrow_parts(graph, node, result)
        node.replace_all_uses_with(result)
        graph.module.graph.erase_node(node)
    tidy(graph)
    return bool(found)


def _narrow_parts(graph: Graph, node: fx.Node, result: fx.Node) -> None:
    """Cast what readers take of several results to float32, if it is float64 now."""
    for part in list(node.users):
        assert is_call(part, operator.getitem)
        if value(result)[part.args[1]].dtype == torch.float64:
            wide = call(graph, part, operator.getitem, result, part.args[1], like=part)
            part.replace_all_uses_with(call(graph, part, aten.to.dtype, wide, torch.float32, like=part))
            graph.module.graph.erase_node(part)


def _is_single(source: object) -> bool:
    """Whether an operand is a float32 tensor."""
    tensor = value(source) if isinstance(source, fx.Node) else None
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32


def _wide(graph: Graph, reader: fx.Node, source: fx.Node, wide: dict[fx.Node, fx.Node]) -> fx.Node:
    """An argument of `reader`, cast to float64 if it is float32; the cast is created once, before its first reader."""
    if not _is_single(source):
        return source
    if source not in wide:
        wide[source] = call(graph, reader, aten.to.dtype, source, torch.float64, like=reader)
    return wide[source]
