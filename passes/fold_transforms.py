"""Transform the input basis of every linear to remove outliers: y = W x = (W D^-1 T^-1) (T D x - m) + W' m.

D scales channels (SmoothQuant's balance of inputs and weights, strength `quantize.smooth`), T is an orthogonal
rotation of any width (Hadamard kron DCT). Transforms are folded where possible: D into the preceding norm or product; T
and D of attention values into v_proj and o_proj, head by head. The rest becomes an online `qpcompile::hadamard` node,
or a `qpcompile::kronecker` node if the factors of T are to be learned (`train_transforms`). m is the mean of the
transformed input (`quantize.center`): it is added to biases, and subtracted in a layer norm's bias or online. Keys and
queries are rotated after the rotary embedding, which leaves their dot products unchanged.

    %s = quant_stub(%n); %y = linear(%s, quant_stub(@w))
      -> %t = qpcompile::hadamard(%n, null); %s = quant_stub(%t); %y = linear(%s, quant_stub(@w'))

Equivalent in exact arithmetic. Sources: "QuaRot" (arXiv 2404.00456), section 4; "SmoothQuant" (arXiv 2211.10438),
equation 4. The DCT for the odd factor of a width is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.edit import add_tensor, aten, call, calls, get_tensor, is_call, layer_of, tidy
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import EXPERT_LINEAR, HADAMARD, KRONECKER, QUANT_STUB
from qpcompile.ir.program import HEAD, Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.quantization.basis import Basis, Change, change_basis, weight_name
from qpcompile.quantization.products import PRODUCTS
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage


@dataclass(frozen=True)
class FoldTransforms:
    """See the module's docstring."""

    name: ClassVar[str] = "fold_transforms"
    purpose: ClassVar[str] = (
        "Transform the input basis of every linear to remove outliers: y = W x = (W D^-1 T^-1) (T D x - m) + W' m."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Returns whether any basis changed."""
        scheme = program.recipe.quantize
        if scheme is None or program.stage == self.gives:
            return False
        changed = False
        graphs = [graph for graph in program.graphs.values() if graph.name != HEAD]
        # Prefill and decode have the same owner and the same weights: the result for prefill applies to both.
        for owner in dict.fromkeys(graph.owner for graph in graphs):
            owned = [graph for graph in graphs if graph.owner == owner]
            basis = change_basis(owned, scheme, program.measured[CALIBRATION], Placement.of(program))
            for graph in owned:
                changed |= _apply(graph, basis, scheme.kv_cache.bits != 16 and scheme.kv_cache.rotate)
        return changed


def _apply(graph: Graph, basis: Basis, rotate_keys: bool) -> bool:
    changed = bool(basis.tensors)
    for linear in list(calls(graph, *PRODUCTS)):
        if (name := basis.biases.get(weight_name(linear))) is not None:
            bias = add_tensor(graph, name, get_tensor(graph.module, name), linear)
            if is_call(linear, EXPERT_LINEAR):
                _add_to_experts(graph, linear, bias)
            else:
                linear.args = (*linear.args[:2], bias)
    for stub in list(calls(graph, QUANT_STUB)):
        fact = stub_fact(stub)
        if fact is None:
            continue
        if fact.role == "activation" and fact.site in basis.nodes:
            _transform(graph, stub, basis.nodes[fact.site], fact.site.replace(".", "_"))
        if fact.role == "key" and rotate_keys:
            changed |= _rotate_key(graph, stub)
    tidy(graph)
    return changed


def _add_to_experts(graph: Graph, product: fx.Node, bias: fx.Node) -> None:
    """Add a bias of each expert, f[E, N], to the product of every slot."""
    own = call(graph, product.next, aten.index.Tensor, bias, [product.args[2]], like=product)
    total = call(graph, own.next, aten.add.Tensor, product, own, like=product)
    product.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _transform(graph: Graph, stub: fx.Node, change: Change, name: str) -> None:
    """Insert the part of the basis change that could not be folded before a stub."""
    x = stub.args[0]
    assert isinstance(x, fx.Node)
    y = x
    factor = None if change.scale is None else add_tensor(graph, f"transforms.{name}", change.scale, stub)
    if change.factors is not None:
        sides = ("left", "right")
        pair = [
            add_tensor(graph, f"transforms.{name}_{side}", side_factor, stub)
            for side, side_factor in zip(sides, change.factors, strict=True)
        ]
        y = call(graph, stub, KRONECKER, y, factor, *pair)
    elif change.rotate:
        y = call(graph, stub, HADAMARD, y, factor)
    elif factor is not None:
        y = call(graph, stub, aten.mul.Tensor, y, factor)
    if change.shift is not None:
        y = call(graph, stub, aten.sub.Tensor, y, add_tensor(graph, f"transforms.{name}_shift", change.shift, stub))
    if value(y).dtype != value(x).dtype:
        # A transform computes in float32; until the quantizer reads its result, the linear needs its weight's type.
        y = call(graph, stub, aten.to.dtype, y, value(x).dtype)
    if y is not x:
        stub.replace_input_with(x, y)


def _rotate_key(graph: Graph, stub: fx.Node) -> bool:
    """Rotate one layer's cached keys and the matching queries; returns whether there are any."""
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
