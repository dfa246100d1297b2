"""Subtract a constant from the keys of each head before they are rounded for the cache (`quantize.kv_cache.center`).

    %s = quant_stub(%k)      becomes      %c = aten::sub(%k, @center), %s = quant_stub(%c)      in prefill and decode

All dot products of one query change by the same number, so attention does not change; only what is rounded does:
channels of keys have means that are large compared with what differs between tokens. The constant m is the mean over
calibration tokens that are not massive.

Massive tokens (attention sinks) are found by their residual: its norm is MASSIVE times the prompt's median at the
layer's input. Their keys are far from the mean, and read by every query. The key s of the most massive one is made
exact: with the constant s - Q(s - m), which is within half a step of m, its difference s - (s - Q(s - m)) = Q(s - m)
is on the grid of the codes. A sink without earlier tokens, the first token of a fixed prompt, has the same key always.

Sources: "KIVI" (arXiv 2402.02750) and "SageAttention" (arXiv 2410.02367), section 4.2, on channel means of keys;
"Massive Activations in Large Language Models" (arXiv 2402.17762) on sinks. The exact sink is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.calibration.collect import run_sample
from qpcompile.ir.edit import add_tensor, aten, call, calls, is_call, tidy
from qpcompile.ir.node_facts import StubFact, stub_fact
from qpcompile.ir.operators import QUANT_STUB, RMSNORM
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.progress import track
from qpcompile.quantization.fake_quant import fake_quantize
from qpcompile.recipe.plan import KeyCenter
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

# Samples that means are taken over, and the norm of a massive residual over the median of its prompt.
SAMPLES, MASSIVE = 32, 10.0


@dataclass(frozen=True)
class CenterKeys:
    """See the module's docstring."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "center_keys"
    purpose: ClassVar[str] = "Subtract a constant from the keys of each head before they are rounded for the cache."
    needs: ClassVar[Stage] = "transformed"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Returns whether any keys are centred; fills `plan.key_centers`."""
        scheme = program.recipe.quantize
        if scheme is None or not scheme.kv_cache.center or program.plan.key_centers or not self.count:
            return False
        found = self._measure(program)
        centers = {layer: keys.center(scheme) for layer, keys in found.items() if keys.tokens}
        for graph in program.language:
            for stub, fact in _keys(graph):
                if fact.layer in centers:
                    _center(graph, stub, fact.layer, centers[fact.layer])
            tidy(graph)
        program.plan = program.plan.changed(key_centers=tuple(found[layer].told(layer) for layer in centers))
        return bool(centers)

    def _measure(self, program: Program) -> dict[int, Keys]:
        """The keys of each layer, on the first samples."""
        graph, on, count = program.graphs[PREFILL], Placement.of(program), min(self.count, SAMPLES)
        ranks, stubs = program.ranks, dict(_keys(graph))
        found = {fact.layer: Keys() for fact in stubs.values() if fact.layer is not None}
        entry, rows, own = torch.empty(0), list[tuple[int, Row]](), list[list[tuple[int, Row]]]()

        def look(node: fx.Node, args: tuple[Any, ...], result: Any) -> Any:
            nonlocal entry
            if is_call(node, RMSNORM, aten.layer_norm.default) and args[0].dim() == 3:
                entry = args[0]
            if node in stubs and (layer := stubs[node].layer) is not None:
                marks = on.there(machine.marks(*result.shape[::2][:2])[1])
                rows.extend((layer, row) for row in rows_of(result, entry, marks))
            return result

        def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return run_watched(graph, feeds, look, on) if graph.name == PREFILL else on.run(graph, feeds)

        with Machine(program, execute) as machine, track(self.name, count, shown=ranks.leads) as step:
            for number, sample in enumerate(islice(self.samples, count)):
                if ranks.mine(number):
                    rows = []
                    run_sample(machine, sample, number)
                    own.append(rows)
                step()
        for layer, row in chain.from_iterable(ranks.merged(own)):
            found[layer].add(row)
        return found


@dataclass(frozen=True)
class Row:
    """The keys of one prompt: as `Keys`, ratio 0 if none is massive."""

    total: torch.Tensor
    energy: float
    tokens: int
    sink: torch.Tensor | None = None
    ratio: float = 0.0


def rows_of(keys: torch.Tensor, residual: torch.Tensor, valid: torch.Tensor) -> Iterator[Row]:
    """keys: f[B, H, S, D], residual: f[B, S, C] at the layer's input, valid: bool[B, S], which are not padding."""
    norms = residual.float().norm(dim=-1) if residual.shape[:2] == valid.shape else valid.float()
    for row, (size, counts) in enumerate(zip(norms, valid, strict=True)):
        ratios = size / size[counts].median().clamp(min=1e-30)
        massive = counts & (ratios > MASSIVE)
        chosen = keys[row][:, counts & ~massive].double()
        found = Row(chosen.sum(dim=1), float(chosen.square().sum()), chosen.shape[1])
        if massive.any():
            place = int(torch.where(massive, ratios, 0).argmax())
            found = replace(found, sink=keys[row][:, place].double(), ratio=float(ratios[place]))
        yield found


@dataclass
class Keys:
    """The keys of one layer: their sum and energy over tokens that are not massive, and the key of the most massive."""

    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    energy: float = 0.0
    tokens: int = 0
    sink: torch.Tensor | None = None
    ratio: float = 0.0

    def add(self, row: Row) -> None:
        """Add the keys of one prompt."""
        self.total = self.total.to(row.total.device) + row.total
        self.energy += row.energy
        self.tokens += row.tokens
        if row.ratio > self.ratio:
            self.sink, self.ratio = row.sink, row.ratio

    @property
    def mean(self) -> torch.Tensor:
        """f64[H, D]."""
        return self.total / max(self.tokens, 1)

    def center(self, scheme: QuantizeScheme) -> torch.Tensor:
        """What is subtracted: f64[1, H, 1, D]."""
        mean = self.mean[None, :, None]
        if self.sink is None:
            return mean
        sink = self.sink[None, :, None]
        on_grid = fake_quantize((sink - mean).float(), StubFact("", "key", None), scheme)
        return sink - on_grid.double()

    def told(self, layer: int) -> KeyCenter:
        """The entry of the plan."""
        share = float(self.mean.square().sum()) * self.tokens / max(self.energy, 1e-30)
        return KeyCenter(layer=layer, share=min(share, 1.0), sink=self.ratio if self.sink is not None else None)


def _keys(graph: Graph) -> list[tuple[fx.Node, StubFact]]:
    """The stubs of keys, with their facts."""
    found = [(stub, stub_fact(stub)) for stub in calls(graph, QUANT_STUB)]
    return [(stub, fact) for stub, fact in found if fact is not None and fact.role == "key"]


def _center(graph: Graph, stub: fx.Node, layer: int, center: torch.Tensor) -> None:
    key = stub.args[0]
    assert isinstance(key, fx.Node)
    held = center.to(device="cpu", dtype=value(key).dtype)
    name = add_tensor(graph, f"cache.{layer}.center", held, stub)
    stub.replace_input_with(key, call(graph, stub, aten.sub.Tensor, key, name))
