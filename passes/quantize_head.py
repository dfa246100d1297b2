"""Quantize the language head's weight to 8 bits; a tied token embedding then reads the same 8-bit rows.

%y = linear(%x, @w, @b)
  -> %y = qpcompile::linear_w8a16(%x, @w_codes, @w_scale, @b)

If the host's token embedding is tied to @w, a graph replaces it:

graph embed
%0 = input input : i64[B, S0]
%1 = embedding(@w_codes, %0); %2 = embedding(@w_scale, %0)
return output = to(%1, f32) * %2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qpcompile.ir.edit import add_tensor, aten, call, calls, fake_mode, get_tensor, tidy
from qpcompile.ir.names import Name
from qpcompile.ir.node_facts import QuantizedFact, set_fact
from qpcompile.ir.operators import LINEAR_W8A16
from qpcompile.ir.program import EMBED, HEAD, Graph, Program
from qpcompile.ir.shapes import new_size
from qpcompile.kernels.linear_w8a16.reference import quantize_rows
from qpcompile.passes.insert_quant_stubs import site_name
from qpcompile.quantization.basis import weight_name
from qpcompile.recipe.plan import LeftOut, Site
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

KERNEL = str(LINEAR_W8A16.name())


@dataclass(frozen=True)
class QuantizeHead:
    """See the module's docstring. Rows are rounded to nearest; a matrix with any other reader is left unchanged."""

    name: ClassVar[str] = "quantize_head"
    purpose: ClassVar[str] = (
        "Quantize the language head's weight to 8 bits; a tied token embedding then reads the same 8-bit rows."
    )
    needs: ClassVar[Stage] = "canonical"
    gives: ClassVar[Stage] = "packed"

    def run(self, program: Program) -> bool:
        """Returns whether the head was quantized; moves it from `plan.left_out` to `plan.sites`."""
        scheme, head = program.recipe.quantize, program.graphs.get(HEAD)
        if scheme is None or scheme.head_bits == 16 or head is None:
            return False
        entries = [
            _quantize(program, head, linear, site)
            for linear in list(calls(head, aten.linear.default))
            if (site := site_name(head, linear)) is not None
        ]
        tidy(head)
        told = {entry.name for entry in entries}
        left_out = [each for each in program.plan.left_out if each.graph != HEAD or each.name not in told]
        left_out += [entry for entry in entries if isinstance(entry, LeftOut)]
        sites = [entry for entry in entries if isinstance(entry, Site)]
        program.plan = program.plan.changed(sites=(*program.plan.sites, *sites), left_out=tuple(left_out))
        return bool(sites)


def _quantize(program: Program, head: Graph, linear: fx.Node, site: str) -> Site | LeftOut:
    """Replace one linear of the head, and the host's embedding if it is tied to the same matrix."""
    name = weight_name(linear)
    weight = get_tensor(head.module, name).detach()
    readers = _readers(program.host, weight)
    for owner, module in readers.items():
        if type(module) is not nn.Embedding or len(readers) > 1:
            reason = (
                f"{owner}, which is not a single table of embeddings ({type(module).__name__}), reads the same matrix"
            )
            return LeftOut(graph=HEAD, name=site, reason=reason)
    on = Placement.of(program)
    codes, scale = map(on.keep, quantize_rows(on.there(weight)))
    stored = add_tensor(head, f"{name}_codes", codes, linear), add_tensor(head, f"{name}_scale", scale, linear)
    every: tuple[Any, ...] = linear.args
    x, _, bias = (*every, None)[:3]
    new = call(head, linear, LINEAR_W8A16, x, *stored, bias, like=linear)
    set_fact(new, QuantizedFact((site,), KERNEL))
    linear.replace_all_uses_with(new)
    head.module.graph.erase_node(linear)
    for owner, module in readers.items():
        program.graphs[EMBED] = _table(head, owner, codes, scale, weight.dtype)
        module._parameters["weight"] = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return Site(graph=HEAD, name=site, weight_bits=8, activation_bits=16, kernel=KERNEL)


def _readers(host: nn.Module, weight: torch.Tensor) -> dict[str, nn.Module]:
    """The modules of the host that hold a tensor, by dotted name."""
    place = weight.data_ptr()
    return {
        name: module
        for name, module in host.named_modules()
        if any(own is not None and own.numel() and own.data_ptr() == place for own in module._parameters.values())
    }


def _table(head: Graph, owner: str, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Graph:
    """The graph of an embedding, codes: i8[V, C], scale: f32[V, 1]: i64[B, S] -> dtype[B, S, C]."""
    made = fx.Graph()
    ids = made.placeholder("input")
    shape = new_size(head, "rows", 2), new_size(head, "tokens", 3)
    with fake_mode(head):
        ids.meta["val"] = torch.empty(shape, dtype=torch.int64, device=codes.device)
    output = made.output((ids,))
    module = fx.GraphModule(nn.Module(), made)
    graph = Graph(EMBED, module, (Name("input"),), (Name("output"),), owner, returns="output")
    rows, steps = (
        call(graph, output, aten.embedding.default, add_tensor(graph, name, tensor, output), ids)
        for name, tensor in (("weight_codes", codes), ("weight_scale", scale))
    )
    y = call(graph, output, aten.mul.Tensor, call(graph, output, aten.to.dtype, rows, torch.float32), steps)
    output.args = ((y if dtype == torch.float32 else call(graph, output, aten.to.dtype, y, dtype),),)
    tidy(graph)
    return graph
