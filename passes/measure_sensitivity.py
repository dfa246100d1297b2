"""Profile each decoder layer: its sensitivity to quantization, and its attention to visual tokens.

Each layer runs twice on the same full-precision input, in full precision and with every stub quantized (with
`sensitivity_input: quantized`, the quantized run reads the output of the quantized layers before it):

    S_l = median over samples of ||x_l^q - x_l|| / (||x_l|| + eta)

Weights are the deployed ones, solved with the recipe's solver and clips. In the quantized layer are measured: the
attention mass on the ten visual tokens that text attends to most, and the mean pairwise cosine of visual tokens.
Without a quantizer all deviations are zero and all layers count as equally sensitive.

Source: "QUOTA" (arXiv 2604.17320), section 3.2 and equation 1; Figures 2 and 3 for the two profiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.calibration.collect import run_sample
from qpcompile.calibration.layer_profile import attention_mass, pairwise_cosine
from qpcompile.errors import PlanError
from qpcompile.ir.attention import attends_to_itself, read_attention
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import aten, is_call, layer_of
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.ir.shapes import value as fake_value
from qpcompile.progress import track
from qpcompile.pruning.budget import DEVIATIONS
from qpcompile.pruning.methods.joint import Joint
from qpcompile.pruning.states import find_states
from qpcompile.pruning.table import PRUNERS
from qpcompile.quantization.fake_quant import ROUNDING, StubRounding
from qpcompile.recipe.plan import LayerFacts
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import PlacedInterpreter, Placement, run_placed
from qpcompile.stages import Stage


@dataclass(frozen=True)
class MeasureSensitivity:
    """See the module's docstring."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "measure_sensitivity"
    purpose: ClassVar[str] = (
        "Profile each decoder layer: its sensitivity to quantization, and its attention to visual tokens."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `program.measured[DEVIATIONS]` and `program.plan.facts`; does nothing if no token is dropped or an
        earlier compile has measured already. Raises PlanError where no sample has visual tokens.
        """
        if program.recipe.tokens.method == "none" or not self.count or DEVIATIONS in program.measured:
            return False
        if find_states(program.graphs[PREFILL]) is not None:
            return False  # no layer has visual tokens of its own
        layers = [layer.index for layer in program.layers]
        table = {layer: LayerRows() for layer in layers}

        def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if graph.name != PREFILL:
                return on.run(graph, feeds)
            visual, _ = machine.marks(*feeds["inputs_embeds"].shape[:2])
            return run_placed(_Twice(program, graph, on.there(visual), seen, rounding, on), feeds)

        on, ranks = Placement.of(program), program.ranks
        rounding = None if program.recipe.order == "prune_then_quantize" else StubRounding.of(program)
        done = _restore(program.checkpoint, table, self.count)
        if rounding is not None and done < self.count:
            rounding.share(program)
        seen, own = dict[int, LayerRows](), list[dict[int, LayerRows]]()
        with Machine(program, execute) as machine, track(self.name, self.count, shown=ranks.leads) as step:
            for number, sample in enumerate(self.samples):
                if number >= done and ranks.mine(number):
                    seen = {layer: LayerRows() for layer in layers}
                    run_sample(machine, sample, number)
                    own.append(seen)
                step()
                last = number + 1 == self.count
                if number < done or not (last or ranks.closes(number)):
                    continue
                for each in chain.from_iterable(ranks.gathered(own)):
                    for layer, rows in each.items():
                        table[layer].extend(rows)
                own.clear()
                if last or program.checkpoint.due():
                    facts = {layer: vars(rows) for layer, rows in table.items()}
                    program.checkpoint.save(self.name, {}, {"samples": number + 1, "layers": facts})
        if not any(rows.cosines for rows in table.values()):
            raise PlanError(
                "no sample has visual tokens in the decoder's prompt: there is nothing to drop",
                where="tokens.method",
                do="write none, or compile with prompts that have pictures",
            )
        if isinstance(PRUNERS[program.recipe.tokens.method], Joint) and rounding is not None:
            # The search of candidates runs next, with the same weights.
            program.measured[ROUNDING] = rounding
        program.measured[DEVIATIONS] = {layer: rows.deviations for layer, rows in table.items()}
        program.plan = program.plan.changed(facts=tuple(rows.facts(layer) for layer, rows in table.items()))
        return False


@dataclass
class LayerRows:
    """Measurements of one layer, one number per sample each."""

    deviations: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def extend(self, other: LayerRows) -> None:
        """Append the measurements of later samples."""
        self.deviations += other.deviations
        self.masses += other.masses
        self.cosines += other.cosines

    def facts(self, layer: int) -> LayerFacts:
        """Medians and interquartile range over the samples."""
        masses = torch.tensor(self.masses or [0.0], dtype=torch.float64)
        low, middle, high = torch.quantile(masses, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        cosine = float(torch.tensor(self.cosines or [0.0], dtype=torch.float64).median())
        return LayerFacts(layer=layer, mass_median=middle, mass_iqr=high - low, cosine=cosine)


@dataclass(frozen=True)
class _Contents:
    """Contents of a checkpoint: the number of samples seen, and the fields of each layer's LayerRows."""

    samples: int
    layers: dict[int, LayerRows]


def _restore(checkpoint: Checkpoint, table: dict[int, LayerRows], count: int) -> int:
    """Load the measurements of an interrupted compile into `table`; returns the number of samples they cover."""
    with checkpoint.found(MeasureSensitivity.name) as kept:
        if kept is None:
            return 0
        kept.fits({})
        facts = kept.read(_Contents)
        if set(facts.layers) != set(table) or not 0 < facts.samples <= count:
            raise ValueError(f"it has {facts.samples} samples and layers {list(facts.layers)}")
        table.update(facts.layers)
        return facts.samples


class _Twice(PlacedInterpreter):
    """Runs the prefill graph and, in parallel, each layer quantized, on that layer's full-precision input.

    visual: bool[B, S], which tokens are visual, if known.
    """

    def __init__(
        self,
        program: Program,
        graph: Graph,
        visual: torch.Tensor | None,
        table: dict[int, LayerRows],
        rounding: StubRounding | None,
        on: Placement,
    ) -> None:
        super().__init__(graph, on)
        self.program, self.visual, self.table = program, visual, table
        self.rounding = rounding
        self.shadow: dict[fx.Node, Any] = {}
        self.layer: int | None = None
        self.entry: torch.Tensor | None = None
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None
        self.embeddings = graph.placeholder("inputs_embeds")
        self.hidden_width = int(fake_value(self.embeddings).shape[2])

    def run_node(self, n: fx.Node) -> Any:
        """Run one node in full precision, and also quantized if it belongs to a layer."""
        layer = layer_of(n) if n.op == "call_function" else None
        if layer is not None and layer != self.layer:
            self._finish()
            self.layer = layer
        if n.op == "output":
            self._finish()
        value = super().run_node(n)
        if layer is not None:
            self._run_shadow(n, value)
        elif n is self.embeddings:
            self.entry = value
        return value

    def _run_shadow(self, n: fx.Node, value: Any) -> None:
        fact = stub_fact(n)
        changed = any(argument in self.shadow for argument in n.all_input_nodes)
        if not changed and fact is None:
            self._note(n, value, value)
            return
        args, kwargs = self.on.arguments(n)
        args, kwargs = fx.map_arg(args, self._quantized), fx.map_arg(kwargs, self._quantized)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        if fact is not None and self.rounding is not None:
            result = self.rounding(result, fact)
        self.shadow[n] = result
        self._note(n, value, result)

    def _note(self, n: fx.Node, value: Any, quantized: Any) -> None:
        """Keep the latest residual stream, and measure attention nodes."""
        is_attention = is_call(n, aten.scaled_dot_product_attention.default) and attends_to_itself(n)
        if is_attention and self.visual is not None:
            read = read_attention(n)
            query, key = self._quantized(read.query), self._quantized(read.key)
            mask = None if read.mask is None else self._quantized(read.mask)
            mass = attention_mass(query, key, mask, read.scale, self.visual)
            if mass is not None and self.layer is not None:
                self.table[self.layer].masses.append(mass)
        if self._is_residual(value):
            self.latest = value, quantized

    def _quantized(self, node: fx.Node) -> Any:
        """A node's value in the quantized layer."""
        return self.shadow[node] if node in self.shadow else self.value_of(node)

    def _is_residual(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[2] == self.hidden_width

    def _finish(self) -> None:
        """At a layer's end: compare its two outputs, and drop the quantized one unless the next layer reads it."""
        if self.layer is not None and self.latest is not None:
            value, quantized = self.latest
            rows, tokens = self.table[self.layer], self.program.recipe.tokens
            full = value if self.entry is None or tokens.sensitivity_of == "output" else value - self.entry
            rows.deviations.append(float((quantized - value).norm() / (full.norm() + tokens.eta)))
            if self.visual is not None and self.visual.any():
                rows.cosines.append(pairwise_cosine(quantized, self.visual))
            self.entry, self.latest = value, None
        # Quantized values flow into the next layer only if the recipe asks for it, and only while they have readers.
        carried = self.program.recipe.tokens.sensitivity_input == "quantized"
        self.shadow = {node: value for node, value in self.shadow.items() if node in self.env} if carried else {}
