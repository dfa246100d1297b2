"""Change the basis of every linear's input so that 4 bits hold it: y = W x = (W D^-1 T^T) (T D x).

D scales channels (SmoothQuant's balance of inputs and weights, strength `quantize.smooth`), T is an orthogonal
rotation of any width (Hadamard kron DCT). What can be folded is: D goes into the norm or the product in front; T and D
of attention values go into v_proj and o_proj, head by head. What cannot becomes a `qpcompile::hadamard` node.
Keys and queries are rotated after rotary positions, which leaves their products as they are.

    %s = quant_stub(%n); %y = linear(%s, quant_stub(@w))
      -> %t = qpcompile::hadamard(%n, null); %s = quant_stub(%t); %y = linear(%s, quant_stub(@w'))

Exact in exact arithmetic. Sources: "QuaRot" (arXiv 2404.00456), section 4; "SmoothQuant" (arXiv 2211.10438),
equation 4. The DCT for the odd factor of a width is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.ir.basis import Basis, find_basis
from qpcompile.ir.edit import add_tensor, aten, call, calls, layer_of, set_tensor, tidy
from qpcompile.ir.facts import stub_fact
from qpcompile.ir.operators import HADAMARD, QUANT_STUB
from qpcompile.ir.program import HEAD, Graph, Program


@dataclass(frozen=True)
class FoldTransforms:
    """See the module's docstring."""

    name: ClassVar[str] = "fold_transforms"
    needs: ClassVar[str] = "calibrated"
    gives: ClassVar[str] = "transformed"

    def run(self, program: Program) -> bool:
        """Returns whether any basis changed."""
        scheme = program.recipe.quantize
        if scheme is None or program.at_least(self.gives):
            return False
        found: dict[str, Basis] = {}
        changed = False
        for graph in program.graphs.values():
            if graph.name == HEAD:
                continue
            # Prefill and decode have one owner and one set of weights: what prefill finds holds for both.
            if graph.owner not in found:
                found[graph.owner] = find_basis(graph, scheme, program.facts["calibration"])
            changed |= _apply(graph, found[graph.owner], scheme.kv_cache.bits == 4 and scheme.kv_cache.rotate)
        return changed


def _apply(graph: Graph, basis: Basis, rotate_keys: bool) -> bool:
    changed = bool(basis.tensors)
    for name, tensor in basis.tensors.items():
        set_tensor(graph.module, name, tensor)
    for stub in list(calls(graph, QUANT_STUB)):
        fact = stub_fact(stub)
        if fact is None:
            continue
        if fact.role == "activation" and fact.site in basis.nodes:
            _transform(graph, stub, basis, fact.site)
        if fact.role == "key" and rotate_keys:
            changed |= _rotate_key(graph, stub)
    tidy(graph)
    return changed


def _transform(graph: Graph, stub: fx.Node, basis: Basis, site: str) -> None:
    """Put the part of the basis change that could not be folded in front of a stub."""
    scale, rotate = basis.nodes[site]
    x = stub.args[0]
    assert isinstance(x, fx.Node)
    factor = None if scale is None else add_tensor(graph, f"transforms.{site.replace('.', '_')}", scale, stub)
    if rotate:
        changed = call(graph, stub, HADAMARD, x, factor)
    elif factor is not None:
        changed = call(graph, stub, aten.mul.Tensor, x, factor)
    else:
        return
    stub.replace_input_with(x, changed)


def _rotate_key(graph: Graph, stub: fx.Node) -> bool:
    """Rotate the keys that enter the cache and the queries that meet them, in one layer; whether there are any."""
    layer, key = layer_of(stub), stub.args[0]
    meets = [node for node in calls(graph, aten.scaled_dot_product_attention.default) if layer_of(node) == layer]
    assert isinstance(key, fx.Node)
    for attention in meets:
        query = attention.args[0]
        assert isinstance(query, fx.Node)
        attention.replace_input_with(query, call(graph, attention, HADAMARD, query, None))
    if meets:
        stub.replace_input_with(key, call(graph, stub, HADAMARD, key, None))
    return bool(meets)
