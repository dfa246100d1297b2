"""Promote reductions before int4 quantizers to float64, so that all back ends produce identical codes.

    %y = aten::layer_norm(%x, ...)      becomes      %a = aten::to.dtype(%x, f64)
                                                     %b = aten::layer_norm(%a, ...)
                                                     %y = aten::to.dtype(%b, f32)

Back ends use different summation orders. Where their float32 results differ in the last bit next to a rounding tie, a
code flips, and with it an occasional answer; kernels/sums.py has the numbers. Our own operators do the same internally.
Models whose activations are not quantized, models in half precision and models on a GPU are left unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.convolutions import CONVOLUTIONS, cuts_patches
from qpcompile.ir.edit import aten, call, calls, tidy
from qpcompile.ir.operators import (
    ACTIVATION_QUANTIZE,
    LAYERNORM_QUANTIZE,
    QUANTIZE_INT4,
    QUANTIZE_INT4_STATIC,
    RMSNORM,
    RMSNORM_QUANTIZE,
    SEGMENT_ATTENTION,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.program import HEAD, Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.stages import Stage

QUANTIZERS = (
    *(QUANTIZE_INT4, QUANTIZE_INT4_STATIC, TRANSFORM_QUANTIZE),
    *(RMSNORM_QUANTIZE, LAYERNORM_QUANTIZE, ACTIVATION_QUANTIZE),
)

# Reductions, and functions that math libraries approximate differently. Plain arithmetic is the same everywhere.
SUMS = (
    *(aten.linear.default, aten.addmm.default, aten.matmul.default, aten.bmm.default, aten.mm.default),
    *(*CONVOLUTIONS, aten.mean.dim, aten.layer_norm.default, RMSNORM),
    *(aten.scaled_dot_product_attention.default, SEGMENT_ATTENTION, aten.softmax.int),
)
FUNCTIONS = (
    *(aten.cos.default, aten.sin.default, aten.exp.default, aten.rsqrt.default),
    *(aten.gelu.default, aten.sigmoid.default, aten.silu.default, aten.tanh.default),
)


@dataclass(frozen=True)
class WidenSums:
    """See the module's docstring. The head is left out: nothing is quantized after it."""

    name: ClassVar[str] = "widen_sums"
    purpose: ClassVar[str] = (
        "Promote reductions before int4 quantizers to float64, so that all back ends produce identical codes."
    )
    needs: ClassVar[Stage] = "fused"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was promoted."""
        quantized = any(any(calls(graph, *QUANTIZERS)) for graph in program.graphs.values())
        if not quantized or any(_elsewhere(tensor) for tensor in program.host.parameters()):
            return False
        changed = [_widen(graph) for name, graph in program.graphs.items() if name != HEAD]
        return any(changed)


def _elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a model with this tensor is in half precision or on a GPU."""
    return tensor.device.type != "cpu" or tensor.element_size() < 4


def _widen(graph: Graph) -> bool:
    found = [node for node in calls(graph, *SUMS, *FUNCTIONS) if value(node).dtype == torch.float32]
    # Runtimes have no float64 for other convolutions.
    found = [node for node in found if node.target not in CONVOLUTIONS or cuts_patches(node)]
    wide: dict[fx.Node, fx.Node] = {}
    for node in found:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source, node=node: _wide(graph, node, source, wide))
        result = call(graph, node, node.target, *args, like=node, **kwargs)
        narrow = call(graph, node, aten.to.dtype, result, torch.float32, like=node)
        node.replace_all_uses_with(narrow)
        graph.module.graph.erase_node(node)
    tidy(graph)
    return bool(found)


def _wide(graph: Graph, reader: fx.Node, source: fx.Node, wide: dict[fx.Node, fx.Node]) -> fx.Node:
    """An argument of `reader`, cast to float64 if it is float32; the cast is created once, before its first reader."""
    tensor = value(source)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        return source
    if source not in wide:
        wide[source] = call(graph, reader, aten.to.dtype, source, torch.float64, like=reader)
    return wide[source]
