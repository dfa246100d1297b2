"""Compute the basis change of each linear's input in one graph, and the tensors it modifies.

s_j = max|x_j|^a / max|W_:j|^(1-a)    D = diag(1/s)    x' = T D x - m    W' = W D^-1 T^-1    b' = b + W' m

m is the mean of T D x over the calibration tokens: the common component is then not quantized with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from qpcompile.calibration.statistics import Calibration, InputStatistics
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import (
    SHAPE_OPS,
    aten,
    calls,
    get_tensor,
    is_call,
    layer_of,
    operands,
    set_tensor,
    through_shape_ops,
)
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import QUANT_STUB, RMSNORM
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import value
from qpcompile.kernels.hadamard.reference import factors, hadamard_matrix
from qpcompile.quantization.basis_change import BasisChange, rotation
from qpcompile.quantization.products import bias_of, matrices_of, rows_of
from qpcompile.quantization.scale_search import search_scale
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement

SMALLEST = 1e-5


@dataclass(frozen=True)
class Change:
    """The online part of the basis change of a site's input: T (x * scale) - shift.

    scale, shift: f32[C]; T is the Hadamard rotation if `rotate`, or given by its factors (left f32[A, A], right f32[c,
    c]) if they are to be learned.
    """

    scale: torch.Tensor | None
    rotate: bool
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    shift: torch.Tensor | None = None

    def to(self, device: torch.device) -> Change:
        """The same on a device."""
        scale, factors, shift = tree_map_only(
            torch.Tensor, lambda each: each.to(device), (self.scale, self.factors, self.shift)
        )
        return Change(scale, self.rotate, factors, shift)


@dataclass
class Basis:
    """Names of modified tensors, online changes by site, and new biases of linears that had none, by weight."""

    tensors: set[str] = field(default_factory=set)
    nodes: dict[str, Change] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)


def change_basis(graphs: Sequence[Graph], scheme: QuantizeScheme, calibration: Calibration, on: Placement) -> Basis:
    """Change the basis of one component: its tensors in all graphs that hold them, and the statistics in `calibration`.

    A tensor is replaced as soon as its new values are known, so that old and new weights never coexist. graphs: of one
    owner; the result for the first applies to all.
    """
    graph = graphs[0]
    finder = _Finder(graph, graphs, scheme, calibration, on, Basis())
    changes = scheme.transform != "none" or scheme.smooth is not None or scheme.scaling != "none"
    balanced = finder.fold_values() if changes and scheme.kv_cache.bits != 16 else set()
    if scheme.weights.bits != 16:
        for stub in list(calls(graph, QUANT_STUB)):
            fact = stub_fact(stub)
            if fact is not None and fact.role == "activation":
                finder.change_input(stub, fact.site, scaled=fact.site not in balanced)
    return finder.basis


@dataclass
class _Finder:
    graph: Graph
    graphs: Sequence[Graph]
    scheme: QuantizeScheme
    calibration: Calibration
    on: Placement
    basis: Basis

    def tensor(self, name: str) -> torch.Tensor:
        """The current value of a tensor, f64, on the device."""
        return self.on.weight(self.graph.module, name).detach().double()

    def statistics(self, site: str) -> InputStatistics | None:
        """The statistics of a site on the device, if there are any."""
        found = self.calibration.inputs.get(site)
        return None if found is None else found.to(self.on.device)

    def keep(self, site: str, statistics: InputStatistics) -> None:
        """Replace the statistics of a site."""
        self.calibration.inputs[site] = statistics.to(self.on.home)

    def update(self, name: str, new: torch.Tensor) -> None:
        """Replace a tensor by f64 values, cast to its type."""
        self._put(name, new.to(get_tensor(self.graph.module, name).dtype).contiguous())

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        tensor = self.on.keep(tensor)
        for graph in self.graphs:
            set_tensor(graph.module, name, tensor)
        self.basis.tensors.add(name)

    def change_input(self, stub: fx.Node, site: str, scaled: bool) -> None:
        """Balance, rotate and centre the input of the linears after one stub."""
        x = stub.args[0]
        assert isinstance(x, fx.Node)
        linears = list(stub.users)
        names = [weight_name(linear) for linear in linears]
        channels = get_tensor(self.graph.module, names[0]).shape[-1]
        rotate = self.scheme.transform != "none"
        scale = self._balance(site, names, rotate) if scaled else None
        turn = BasisChange(channels, rotate, scale, self.on.device)
        if scale is not None or rotate:
            for name in names:
                self._turn(name, turn)
            self._move(site, turn.statistics)
        folded = scale is not None and self._fold_scale(x, stub, scale)
        rest = None if scale is None or folded else scale.float()
        shift = self._center(site, linears)
        if shift is not None:
            before = turn.back(shift)
            if self._fold_shift(x, stub, before * scale if folded and scale is not None else before):
                shift = None
        learned = factors(channels) if self.scheme.transform in ("rotation", "flatquant") else None
        if rest is not None or rotate or shift is not None:
            shift = None if shift is None else shift.float()
            self.basis.nodes[site] = Change(rotate=rotate, scale=rest, factors=learned, shift=shift).to(self.on.home)

    def _turn(self, name: str, turn: BasisChange) -> None:
        """Change the basis of a weight's inputs; those of experts one after the other."""
        weight = self.on.weight(self.graph.module, name).detach()
        made = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for old, new in zip(matrices_of(weight), matrices_of(made), strict=True):
            new.copy_(turn.weights(old.double()))
        self._put(name, made)

    def _move(self, site: str, change: Callable[[InputStatistics], InputStatistics]) -> None:
        """Replace the statistics of a site, and of its experts, if there are any."""
        for name in self.calibration.names(site):
            self.keep(name, change(self.calibration.inputs[name].to(self.on.device)))

    def _center(self, site: str, linears: list[fx.Node]) -> torch.Tensor | None:
        """Fold the mean of a site's transformed input into biases; returns the shift to subtract, f64[C]."""
        least, statistics = self.scheme.center, self.statistics(site)
        if least is None or statistics is None or not statistics.tokens:
            return None
        mean = statistics.mean.double()
        energy = statistics.rows.double().pow(2).sum(dim=-1).mean()
        if mean.pow(2).sum() <= least * energy:
            return None
        for linear in linears:
            self._add_bias(linear, self.tensor(weight_name(linear)) @ mean)
        self._move(site, lambda found: found.shifted(mean))
        return mean

    def _fold_shift(self, x: fx.Node, stub: fx.Node, shift: torch.Tensor) -> bool:
        """Fold the shift into the bias of the norm that produces x, if only this stub reads it; returns success."""
        bias = operands(x)["bias"] if is_call(x, aten.layer_norm.default) else None
        if list(x.users) != [stub] or not isinstance(bias, fx.Node) or len(bias.users) > 1:
            return False
        self.update(str(bias.target), self.tensor(str(bias.target)) - shift)
        return True

    def _add_bias(self, linear: fx.Node, more: torch.Tensor) -> None:
        """Add f64[N], or f64[E, N] of experts, to the bias of a linear, creating it if there is none."""
        name = self.bias_name(linear)
        if name is not None:
            self.update(name, self.tensor(name) + more)
            return
        weight = weight_name(linear)
        module = weight.removesuffix(".weight")
        # A weight of another name is a parameter itself, and has nothing below it.
        name = f"{weight}_bias" if module == weight else f"{module}.bias"
        self.basis.biases[weight] = name
        self._put(name, more.to(get_tensor(self.graph.module, weight).dtype))

    def bias_name(self, linear: fx.Node) -> str | None:
        """The name of a linear's bias, including a newly created one."""
        return self.basis.biases.get(weight_name(linear), _bias_name(linear))

    def _balance(self, site: str, names: list[str], rotate: bool) -> torch.Tensor | None:
        """1 / s for the linears `names`, f64[C], by strength or by search; None if the recipe asks for neither, or
        without data.
        """
        strength, statistics = self.scheme.smooth, self.statistics(site)
        if statistics is None or not statistics.tokens:
            return None
        if self.scheme.scaling != "none":
            ratio = self.calibration.ratios.get(site, 1.0)
            importance = torch.where(statistics.visual, ratio, 1.0)
            wide = torch.cat([self._rows(name) for name in names])
            turn = rotation(wide.shape[1], rotate, wide.device)
            return search_scale(statistics.rows, wide, turn, self.scheme, importance)
        if strength is None:
            return None
        weights = torch.stack([self._rows(name).abs().amax(dim=0).double() for name in names]).amax(dim=0)
        return _inverse_smoothing(statistics.largest.double(), weights, strength)

    def _rows(self, name: str) -> torch.Tensor:
        """The rows of a weight in its own type, those of all experts: f[rows, C], on the device."""
        return rows_of(self.on.weight(self.graph.module, name).detach())

    def _carry(self, site: str, blocks: torch.Tensor) -> None:
        """Carry the statistics of a site through block_diag(blocks), blocks: f64[H, D, D]."""

        def rows(x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("hij,nhj->nhi", blocks, x.unflatten(1, blocks.shape[:2])).flatten(1)

        if (found := self.statistics(site)) is not None:
            self.keep(site, found.turned(rows))

    def _fold_scale(self, x: fx.Node, stub: fx.Node, scale: torch.Tensor) -> bool:
        """Fold a per-channel scale into the producer of x, if only this stub reads it; returns whether it could."""
        if list(x.users) != [stub]:
            return False
        if is_call(x, RMSNORM):
            return self._scale_tensors([x.args[1]], scale)
        if is_call(x, aten.layer_norm.default):
            norm = operands(x)
            return self._scale_tensors([norm["weight"], norm["bias"]], scale)
        if is_call(x, aten.mul.Tensor):
            for factor in x.args:
                if _makes_each_channel(factor, scale.numel()):
                    return self._scale_rows(factor, scale)  # type: ignore[arg-type]
        return False

    def _scale_tensors(self, nodes: list[object], scale: torch.Tensor) -> bool:
        if not all(isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1 for node in nodes):
            return False
        for node in nodes:
            assert isinstance(node, fx.Node)
            self.update(str(node.target), self.tensor(str(node.target)) * scale)
        return True

    def _scale_rows(self, linear: fx.Node, scale: torch.Tensor) -> bool:
        name, bias = weight_name(linear), self.bias_name(linear)
        self.update(name, self.tensor(name) * scale[:, None])
        if bias is not None:
            self.update(bias, self.tensor(bias) * scale)
        return True

    def fold_values(self) -> set[str]:
        """Balance and rotate attention values head by head, inside v_proj and o_proj; returns the o_proj sites."""
        done = set()
        for stub in list(calls(self.graph, QUANT_STUB)):
            fact = stub_fact(stub)
            if fact is None or fact.role != "value":
                continue
            pair = _value_and_output(self.graph, stub)
            if pair is None:
                continue
            produce, consume = pair
            site = _stub_site(consume)
            if site is not None and self._fold_head(stub, produce, consume, site):
                done.add(site)
        return done

    def _fold_head(self, stub: fx.Node, produce: fx.Node, consume: fx.Node, site: str) -> bool:
        _, heads, _, width = value(stub).shape
        into, out = weight_name(produce), weight_name(consume)
        columns = self.tensor(out)
        repeats = columns.shape[1] // (heads * width)
        if self.tensor(into).shape[0] != heads * width or columns.shape[1] != repeats * heads * width:
            return False
        scale = torch.ones(heads, width, dtype=torch.float64, device=columns.device)
        statistics = self.statistics(site)
        if self.scheme.smooth is not None and statistics is not None and statistics.tokens:
            largest = statistics.largest.double().view(heads, repeats, width).amax(dim=1)
            weights = columns.abs().amax(dim=0).view(heads, repeats, width).amax(dim=1)
            scale = _inverse_smoothing(largest.flatten(), weights.flatten(), self.scheme.smooth).view(heads, width)
        turn = torch.eye(width, dtype=torch.float64)
        if self.scheme.transform != "none":
            turn = hadamard_matrix(width).double()
        blocks = turn.to(columns.device)[None] * scale[:, None, :]
        inverse = torch.linalg.inv(blocks)
        rows = self.tensor(into).view(heads, width, -1)
        self.update(into, (blocks @ rows).reshape(heads * width, -1))
        if (bias := _bias_name(produce)) is not None:
            self.update(bias, (blocks @ self.tensor(bias).view(heads, width, 1)).flatten())
        spread = inverse.repeat_interleave(repeats, dim=0)
        parts = columns.view(-1, heads * repeats, width).transpose(0, 1)
        self.update(out, (parts @ spread).transpose(0, 1).reshape(columns.shape))
        self._carry(site, blocks.repeat_interleave(repeats, dim=0))
        return True


def _makes_each_channel(factor: object, channels: int) -> bool:
    """Whether a factor of a product is a linear with one row per channel and no other reader."""
    if not isinstance(factor, fx.Node) or not is_call(factor, aten.linear.default):
        return False
    return len(factor.users) == 1 and value(factor).shape[-1] == channels


def weight_name(linear: fx.Node) -> str:
    """The name of a linear's weight tensor, through its stub."""
    weight = linear.args[1]
    if is_call(weight, QUANT_STUB):
        weight = weight.args[0]  # type: ignore[union-attr]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def _bias_name(linear: fx.Node) -> str | None:
    bias = bias_of(linear)
    return None if bias is None else str(bias.target)


def _inverse_smoothing(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """1 / s, s = inputs^strength / weights^(1 - strength); unused channels keep scale 1."""
    scale = weights.clamp(min=SMALLEST).pow(1 - strength) / inputs.clamp(min=SMALLEST).pow(strength)
    return torch.where((inputs > 0) & (weights > 0), scale, torch.ones_like(scale))


def _value_and_output(graph: Graph, stub: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The linear that produces a layer's values and the one that reads its attention, if only shapes change between."""
    source = stub.args[0]
    assert isinstance(source, fx.Node)
    produce = through_shape_ops(source)
    if not is_call(produce, aten.linear.default) or not _sole_reader(produce, stub) or not _read_as_value(stub):
        return None
    for linear in calls(graph, aten.linear.default):
        origin = linear.args[0]
        assert isinstance(origin, fx.Node)
        attention = through_shape_ops(origin, extra=(QUANT_STUB,))
        if is_call(attention, aten.scaled_dot_product_attention.default) and layer_of(attention) == layer_of(stub):
            return (produce, linear) if _sole_reader(attention, linear) else None
    return None


def _read_as_value(stub: fx.Node) -> bool:
    """Whether only attention and the cache read the stub, as values (some models derive keys from values)."""
    pending = [stub]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_call(user, *SHAPE_OPS, aten.cat.default):
                pending.append(user)
            elif is_call(user, aten.scaled_dot_product_attention.default):
                read = read_attention(user)
                if node is not read.value or node in (read.query, read.key):
                    return False
            elif user.op != "output" and not is_call(user, aten.sym_size.int):
                return False
    return True


def _sole_reader(source: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` is the only reader of `source`, looking through shape operators."""
    node = source
    while node is not reader:
        # Reading a size does not read the tensor's values.
        users = [user for user in node.users if not is_call(user, aten.sym_size.int)]
        if len(users) != 1:
            return False
        (node,) = users
    return True


def _stub_site(linear: fx.Node) -> str | None:
    source = linear.args[0]
    fact = stub_fact(source) if isinstance(source, fx.Node) else None
    return fact.site if fact is not None else None
