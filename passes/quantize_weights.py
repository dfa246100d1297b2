"""Quantize every stubbed weight to 4 or 8 bits, and replace its linear by an operator on the codes.

%y = linear(quant_stub(%x), quant_stub(@w), @b)
  -> %q = qpcompile::quantize_dynamic(%x)                                  once per input
     or %q = qpcompile::quantize_static(%x, where(%visual, @visual, @text))    scales from calibration
     %y = qpcompile::linear_int(%q, @w_packed, @w_scale, @b)           activations in 4 or 8 bits
  or %y = qpcompile::linear_w4a16(%x, @w_packed, @w_scale, @b)          activations left as they are
     and linear_w8a16 with 8-bit weights, which are stored unpacked as @w_codes

%y = expert_linear(quant_stub(%x), quant_stub(@w), %i)
  -> %y = qpcompile::expert_linear_int(%q, @w_packed, @w_scale, %i)    activations in 4 or 8 bits
  or %y = qpcompile::expert_linear_a16(%x, @w_packed, @w_scale, %i)     activations left as they are
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.errors import CalibrationError, RecipeError
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import (
    add_tensor,
    before_cast,
    call,
    calls,
    drop_tensor,
    get_tensor,
    is_call,
    tidy,
)
from qpcompile.ir.node_facts import QuantizedFact, set_fact, stub_fact
from qpcompile.ir.operators import (
    EXPERT_LINEAR,
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    LINEAR_INT,
    LINEAR_W4A16,
    LINEAR_W8A16,
    QUANT_STUB,
    QUANTIZE_DYNAMIC,
    QUANTIZE_STATIC,
)
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.kernels.linear_int.packing import packed_width, stored_codes
from qpcompile.progress import track
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.grids import CHANGED, GRIDS
from qpcompile.quantization.products import PRODUCTS, bias_of, rows_of, solve_weight, solving_cost
from qpcompile.quantization.site_bits import inputs_at, weights_at
from qpcompile.quantization.static_scales import select_scale, static_scales
from qpcompile.recipe.plan import KEPT, Site
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

_LOG = logging.getLogger("qpcompile")


@dataclass(frozen=True)
class _Stored:
    """Codes of a weight as they are stored (kernels/linear_int/packing.py), their scales, and the error of the output.

    unseen: of the experts whose weights they are, how many no calibration token chose; None without statistics.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    error: float
    unseen: int | None = None


@dataclass(frozen=True)
class _Facts:
    """What a checkpoint of this compile holds beside the codes, as in `_Stored`."""

    error: float
    unseen: int | None


@dataclass(frozen=True)
class _Place:
    """The linears that read one weight, with their graphs, and what an interrupted compile has solved."""

    readers: list[tuple[Graph, fx.Node]]
    kept: _Stored | None

    def cost(self) -> float:
        """About the multiplications of solving it: nothing if that is done."""
        graph, linear = self.readers[0]
        return 0.0 if self.kept is not None else solving_cost(get_tensor(graph.module, weight_name(linear)))


@dataclass(frozen=True)
class _Found:
    """The codes of a weight. said: what a quantized checkpoint had for it. new: solved now, and not saved yet."""

    solved: _Stored
    said: str | None = None
    new: bool = False


@dataclass(frozen=True)
class QuantizeWeights:
    """See the module's docstring. Weights that prefill and decode share are solved once."""

    name: ClassVar[str] = "quantize_weights"
    purpose: ClassVar[str] = (
        "Quantize every stubbed weight to 4 or 8 bits, and replace its linear by an operator on the codes."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "packed"

    def run(self, program: Program) -> bool:
        """Returns whether any linear was quantized; fills `plan.sites`."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.weights.bits == 16:
            return False
        sites: dict[str, dict[str, Site]] = {name: {} for name in program.graphs}
        quantized: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        calibration, places, on = program.measured[CALIBRATION], _places(program), Placement.of(program)
        checkpoint, ranks = program.checkpoint, program.ranks

        def work(place: _Place) -> _Found:
            graph, linear = place.readers[0]
            said, own = _own_codes(program, graph, linear, scheme)
            if (solved := own or place.kept) is not None:
                return _Found(solved, said)
            return _Found(_solve(graph, linear, scheme, calibration, on), said, new=True)

        waiting = (_Place(readers, _kept(*readers[0], scheme, checkpoint)) for readers in places.values())
        with track("quantize_weights", sum(map(len, places.values())), shown=ranks.leads) as step:
            for place, found in ranks.spread(waiting, _Place.cost, work):
                readers, solved = place.readers, found.solved
                if found.new:
                    title, facts = _title(readers[0][1]), {"error": solved.error, "unseen": solved.unseen}
                    checkpoint.save(title, {"stored": solved.codes, "scale": solved.scale}, facts)
                solved = replace(solved, codes=on.keep(solved.codes), scale=on.keep(solved.scale))
                # In prefill and decode at once: the full-precision weight is then freed.
                for graph, linear in readers:
                    site = _replace(graph, linear, scheme, calibration, solved, quantized, on)
                    site = site.model_copy(update={"codes": found.said})
                    sites[site.graph][site.name] = site
                for graph, linear in readers:
                    _forget(graph, linear)
                    step()
        for graph in program.graphs.values():
            _drop_stubs(graph, ("activation", "weight"))
            tidy(graph)
        made = [site for by_name in sites.values() for site in by_name.values()]
        program.plan = program.plan.changed(sites=(*program.plan.sites, *made))
        _tell(made)
        _tell_unseen(made)
        return bool(made)


def _tell(sites: list[Site]) -> None:
    """Log how many linears keep the codes of a quantized checkpoint, and why others do not."""
    said = {site.name: site.codes for site in sites if site.codes is not None}
    kept = [name for name, codes in said.items() if codes == KEPT]
    again = Counter(codes for codes in said.values() if codes != KEPT)
    if said:
        why = "; ".join(f"{count} were rounded again: {reason}" for reason, count in again.items())
        _LOG.warning("%d linears keep the codes of the checkpoint%s", len(kept), f"; {why}" if why else "")


def _tell_unseen(sites: list[Site]) -> None:
    """Log how many experts were solved without tokens of their own."""
    unseen = {site.name: site.unseen_experts for site in sites if site.unseen_experts}
    if unseen:
        _LOG.warning(
            "%d experts, in %d weights, were chosen by no calibration token: they are rounded by the tokens of the "
            "others; more samples reach more of them (calibration.samples)",
            sum(unseen.values()),
            len(unseen),
        )


def _places(program: Program) -> dict[str, list[tuple[Graph, fx.Node]]]:
    """Site -> the linears that read its weight, with their graphs."""
    found: dict[str, list[tuple[Graph, fx.Node]]] = {}
    for graph in program.graphs.values():
        for linear in calls(graph, *PRODUCTS):
            stub = linear.args[1]
            if is_call(stub, QUANT_STUB) and (fact := stub_fact(stub)) is not None:
                found.setdefault(fact.site, []).append((graph, linear))
    return found


def _replace(
    graph: Graph,
    linear: fx.Node,
    scheme: QuantizeScheme,
    calibration: Calibration,
    solved: _Stored,
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node]],
    on: Placement,
) -> Site:
    """Replace one linear by the integer operator for all its readers; returns the site for the plan."""
    stub, weight_stub = linear.args[0], linear.args[1]
    assert isinstance(stub, fx.Node) and isinstance(weight_stub, fx.Node)
    fact, group = stub_fact(weight_stub), stub_fact(stub)
    assert fact is not None and group is not None
    name, inputs, weights = weight_name(linear), inputs_at(group, scheme), weights_at(fact, scheme)
    weight = add_tensor(graph, f"{name}_{'packed' if weights.bits == 4 else 'codes'}", solved.codes, linear)
    factor = add_tensor(graph, f"{name}_scale", solved.scale, linear)
    # What follows the codes and scales of a weight: the choice of experts, or a bias.
    experts = is_call(linear, EXPERT_LINEAR)
    last = linear.args[2] if experts else bias_of(linear)
    if inputs.bits != 16:
        if stub not in quantized:
            pair = _quantize_input(graph, stub, scheme, calibration, on)
            quantized[stub] = (
                call(graph, stub, operator.getitem, pair, 0),
                call(graph, stub, operator.getitem, pair, 1),
            )
        codes, step = quantized[stub]
        dtype = value(linear).dtype
        target = EXPERT_LINEAR_INT if experts else LINEAR_INT
        new = call(graph, linear, target, codes, step, weight, factor, last, dtype, inputs.bits, like=linear)
    else:
        target = EXPERT_LINEAR_A16 if experts else LINEAR_W4A16 if weights.bits == 4 else LINEAR_W8A16
        new = call(graph, linear, target, stub.args[0], weight, factor, last, like=linear)
    kernel = str(new.target.name())  # type: ignore[union-attr]
    set_fact(new, QuantizedFact((fact.site,), kernel))
    linear.replace_all_uses_with(new)
    return Site(
        graph=graph.name,
        name=fact.site,
        weight_bits=weights.bits,
        activation_bits=inputs.bits,
        error=solved.error,
        kernel=kernel,
        unseen_experts=solved.unseen,
    )


def _forget(graph: Graph, linear: fx.Node) -> None:
    """Remove a dead linear, and its weight if no other node reads it."""
    name, stub = weight_name(linear), linear.args[1]
    assert isinstance(stub, fx.Node)
    graph.module.graph.erase_node(linear)
    if stub.users:
        return
    (source,) = stub.all_input_nodes
    graph.module.graph.erase_node(stub)
    if not source.users:
        graph.module.graph.erase_node(source)
    if all(node.target != name for node in graph.nodes if node.op == "get_attr"):
        drop_tensor(graph.module, name)


def _quantize_input(
    graph: Graph, stub: fx.Node, scheme: QuantizeScheme, calibration: Calibration, on: Placement
) -> fx.Node:
    """The quantizer of a stubbed input, with dynamic scales or with static ones computed now."""
    fact, x = stub_fact(stub), stub.args[0]
    assert fact is not None and isinstance(x, fx.Node)
    # The float32 result of a transform is rounded once, to codes, and not to the model's type first.
    x = before_cast(x) if value(before_cast(x)).dtype == torch.float32 else x
    inputs = inputs_at(fact, scheme)
    if inputs.granularity != "modality":
        clip = inputs.clip_ratio if fact.clip is None else fact.clip
        return call(graph, stub, QUANTIZE_DYNAMIC, x, inputs.kernel_group, clip, inputs.bits)
    statistics = calibration.inputs.get(fact.site)
    if statistics is None or not len(statistics.rows):
        raise CalibrationError(
            "a static scale cannot be found: no calibration sample reached this input",
            where=fact.site,
            do="give samples that use it, add it to quantize.ignore, or set quantize.activations.granularity to token",
        )
    weights = [on.weight(graph.module, weight_name(linear)).detach() for linear in stub.users]
    scales = static_scales(statistics.to(on.device), torch.cat([rows_of(weight) for weight in weights]), inputs)
    scale = select_scale(graph, stub, scales.to(on.home), fact.site.replace(".", "_"))
    return call(graph, stub, QUANTIZE_STATIC, x, scale, inputs.bits)


def _title(linear: fx.Node) -> str:
    """The name of a linear's weight in a checkpoint of this compile."""
    fact = stub_fact(linear.args[1])  # type: ignore[arg-type]
    assert fact is not None
    return f"{QuantizeWeights.name} {fact.site}"


def _kept(graph: Graph, linear: fx.Node, scheme: QuantizeScheme, checkpoint: Checkpoint) -> _Stored | None:
    """The codes and scales of a linear's weight that an interrupted compile has solved."""
    fact = stub_fact(linear.args[1])  # type: ignore[arg-type]
    assert fact is not None
    weights = weights_at(fact, scheme)
    with checkpoint.found(_title(linear)) as kept:
        if kept is None:
            return None
        *rows, columns = get_tensor(graph.module, weight_name(linear)).shape
        groups = columns // (weights.kernel_group or columns)
        packed = weights.bits == 4
        stored = ((*rows, packed_width(columns)), torch.uint8) if packed else ((*rows, columns), torch.int8)
        expected = {"stored": stored, "scale": ((*rows, groups), torch.float32)}
        codes, scale = kept.fits(expected).values()
        facts = kept.read(_Facts)
        return _Stored(codes, scale, facts.error, facts.unseen)


def _own_codes(
    program: Program, graph: Graph, linear: fx.Node, scheme: QuantizeScheme
) -> tuple[str | None, _Stored | None]:
    """What a quantized checkpoint gives for a linear: in words, None for others; and its codes, if they are of the grid
    that the recipe asks for.
    """
    fact, grids = stub_fact(linear.args[1]), program.measured.get(GRIDS)  # type: ignore[arg-type]
    assert fact is not None
    if not grids:
        return None, None
    if fact.site not in grids:
        return "the checkpoint has no codes of it", None
    grid, asked = grids[fact.site], weights_at(fact, scheme)
    weight = get_tensor(graph.module, weight_name(linear)).detach()
    codes = grid.codes(weight)
    why = grid.mismatch(weight, asked) if codes is not None else CHANGED
    if codes is None or why:
        return why, None
    return KEPT, _Stored(stored_codes(codes, asked.bits), grid.scale, 0.0)


def _solve(graph: Graph, linear: fx.Node, scheme: QuantizeScheme, calibration: Calibration, on: Placement) -> _Stored:
    group, fact = (stub_fact(argument) for argument in linear.args[:2] if isinstance(argument, fx.Node))
    assert group is not None and fact is not None
    weight, asked = on.weight(graph.module, weight_name(linear)).detach(), weights_at(fact, scheme)
    size = asked.kernel_group
    if size and weight.shape[-1] % size:
        raise RecipeError(
            f"{fact.site} has {weight.shape[-1]} inputs, which {size} does not divide",
            where="quantize.weights.group_size",
            do="choose a size that divides the widths, granularity: channel, or add the linear to quantize.ignore",
        )
    solved = solve_weight(weight, group.site, calibration.inputs, asked, on.device)
    stored = stored_codes(rows_of(solved.codes), asked.bits).unflatten(0, weight.shape[:-1])
    return _Stored(on.back(stored), on.back(solved.scale), solved.error, solved.unseen)


def _drop_stubs(graph: Graph, roles: tuple[str, ...]) -> None:
    for stub in list(calls(graph, QUANT_STUB)):
        fact = stub_fact(stub)
        if fact is None or fact.role in roles:
            stub.replace_all_uses_with(stub.args[0])  # type: ignore[arg-type]
            graph.module.graph.erase_node(stub)
