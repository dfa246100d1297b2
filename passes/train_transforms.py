"""Train the basis change before each quantized linear, block by block, on the block's output error.

    block: a layer of a graph, or the part after the layers. Both the full-precision block and the quantized one get the
    same full-precision inputs, each prompt with its own masks and positions, and

        loss = sum over non-padding tokens || y_q - y ||^2 / || y ||^2      y: what later blocks read

    is minimised by Adam over the factors and clip ratios of all its sites. Weights are rounded to nearest during
    training; `quantize_weights` solves them afterwards, in the new basis.

    %t = qpcompile::kronecker(%n, @scale, @left, @right)   ->   the same with new factors, and new weights after it

Source: "FlatQuant" (arXiv 2410.09426), section 3.1; masks of each prompt are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import monotonic
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint as recomputed

from qpcompile.calibration.batches import batches
from qpcompile.calibration.blocks import Block, Values, split_blocks
from qpcompile.calibration.collect import run_sample
from qpcompile.calibration.second_moments import SecondMoments
from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import aten, before_cast, calls, is_call, set_tensor
from qpcompile.ir.heap import trim
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.operators import KRONECKER, QUANT_STUB
from qpcompile.ir.program import DECODE, HEAD, PREFILL, Graph, Program
from qpcompile.progress import track
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.block_sums import SumsOfMatrix, SumsOfRows
from qpcompile.quantization.fake_quant import fake_quantize
from qpcompile.quantization.learned_transform import LearnedTransform, carried, kronecker_rows, rounded
from qpcompile.quantization.products import rows_of
from qpcompile.quantization.site_bits import inputs_at, weights_at
from qpcompile.quantization.training_time import TrainingTime
from qpcompile.ranks import windows
from qpcompile.recipe.plan import TrainedBlock
from qpcompile.recipe.quantize import QuantizeScheme, WeightScheme
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

# Called with the seconds of one step of a block.
Tell = Callable[..., None]


@dataclass(frozen=True)
class TrainTransforms:
    """See the module's docstring."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "train_transforms"
    purpose: ClassVar[str] = (
        "Train the basis change before each quantized linear, block by block, on the block's output error."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Returns whether anything was trained; fills `plan.trained`."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.transform not in ("rotation", "flatquant") or program.plan.trained:
            return False
        if not self.count:
            return False
        time = TrainingTime(scheme.training)
        feeds = self._feeds(program, time)
        trained: list[TrainedBlock] = []
        done: set[str] = set()
        for name in list(feeds):
            owner = program.graphs[name].owner
            if owner in done:  # another graph of the same weights: it has got the factors
                del feeds[name]
                continue
            done.add(owner)
            trained += _train_graph(program, program.graphs[name], feeds.pop(name), scheme, time)
        program.plan = program.plan.changed(trained=tuple(trained))
        return bool(trained)

    def _feeds(self, program: Program, time: TrainingTime) -> dict[str, list[_Batch]]:
        """The inputs of each graph, batch by batch."""
        held: dict[str, list[_Batch]] = {}
        training = time.options
        count = min(self.count, training.samples)
        on = Placement.of(program)

        def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if graph.name in (HEAD, DECODE):
                return on.run(graph, feeds)
            valid = machine.valid if graph.name == PREFILL else None
            held.setdefault(graph.name, []).append(_Batch(dict(feeds), valid))
            began = monotonic()
            results = on.run(graph, feeds)
            time.add_forward(graph.name, monotonic() - began)
            return results

        with Machine(program, execute) as machine:
            for first, batch in batches(islice(self.samples, count), training.batch):
                run_sample(machine, batch, first)
        return held


@dataclass
class _Batch:
    """The inputs of a graph, which of its tokens are not padding (bool[B, S], None: all), and the live values."""

    feeds: dict[str, torch.Tensor]
    valid: torch.Tensor | None
    values: Values = field(default_factory=dict)


def _train_graph(
    program: Program, graph: Graph, fed: list[_Batch], scheme: QuantizeScheme, time: TrainingTime
) -> Iterator[TrainedBlock]:
    entry, blocks = split_blocks(graph)
    on = Placement.of(program)
    with torch.no_grad(), on.holding():
        for batch in fed:
            batch.values, batch.feeds = on.back(entry.run(batch.feeds, on)), {}
    ranks, checkpoint = program.ranks, program.checkpoint
    with track(f"train {graph.name}", len(blocks), shown=ranks.leads) as step:
        # Blocks do not depend on what others have learned: each rank trains one of those of a turn.
        for turn in windows(blocks, ranks.size):
            trainings: list[_Training] = []
            known: list[Trained | None] = []
            own: Callable[[], Trained] | None = None
            for place, block in enumerate(turn):
                began = monotonic()
                with torch.no_grad(), on.holding():
                    targets = [on.back(block.run(batch.values, on)) for batch in fed]
                    training = _Training(graph, block, scheme, program.measured[CALIBRATION], on)
                tell = partial(time.tell, graph.name, len(blocks), len(fed), forward=monotonic() - began)
                trainings.append(training)
                known.append(training.restored(checkpoint) if training.trains else None)
                if training.trains and known[-1] is None and ranks.mine(place):
                    own = partial(training.run, [replace(batch) for batch in fed], targets, tell)
                for batch, values in zip(fed, targets, strict=True):
                    batch.values = values
            with on.holding():
                found = ranks.gathered(None if own is None else own())
            del own
            for training, kept, new in zip(trainings, known, found, strict=False):
                if (trained := kept or new) is not None:
                    if kept is None:
                        checkpoint.save(training.title, trained.tensors, trained.losses)
                    training.take(trained)
                    before, after = trained.losses
                    if after < before:
                        training.fold(program)
                    yield TrainedBlock(name=training.block.name, before=before, after=min(before, after))
                trim()
                step()


@dataclass(frozen=True)
class Trained:
    """What was learned for a block, at home, and its loss before and after."""

    tensors: dict[str, torch.Tensor]
    losses: tuple[float, float]


class _Training:
    """One block with a learned transform at each of its sites."""

    def __init__(
        self, graph: Graph, block: Block, scheme: QuantizeScheme, calibration: Calibration, on: Placement
    ) -> None:
        self.graph, self.block, self.scheme, self.calibration, self.on = graph, block, scheme, calibration, on
        self.sites: dict[str, LearnedTransform] = {}
        self.owners: dict[fx.Node, LearnedTransform] = {}
        # The rounded weights in the new basis; recomputed for every step.
        self.weights: dict[fx.Node, torch.Tensor] = {}
        for stub in block.nodes:
            fact = stub_fact(stub) if is_call(stub, QUANT_STUB) else None
            node = _kronecker(stub) if fact is not None and fact.role == "activation" else None
            if fact is None or node is None:
                continue
            left, right = (on.weight(graph.module, _target(node.args[side])) for side in (2, 3))
            clip = scheme.activations.clip_ratio if fact.clip is None else fact.clip
            learned = LearnedTransform(scheme.transform == "rotation", len(left), len(right), min(clip, 0.99))
            learned.to(on.device)
            self.sites[fact.site] = learned
            for owned in (stub, *(linear.args[1] for linear in stub.users)):
                assert isinstance(owned, fx.Node)
                self.owners[owned] = learned

    @property
    def trains(self) -> bool:
        """Whether there is anything to learn, and anything that it changes."""
        return bool(self.sites and self.block.results)

    def run(self, fed: list[_Batch], targets: list[Values], tell: Tell) -> Trained:
        """Train; `targets`: the full-precision values after the block."""
        before = self.mean_loss(fed, targets)
        self.begin()
        self.train(fed, targets, tell)
        losses = before, self.mean_loss(fed, targets)
        return Trained(self.on.back({name: tensor.detach().clone() for name, tensor in self._state().items()}), losses)

    def restored(self, checkpoint: Checkpoint) -> Trained | None:
        """What an interrupted compile has learned for this block; None if nothing was saved."""
        with checkpoint.found(self.title) as kept:
            if kept is None:
                return None
            tensors = kept.fits({name: (each.shape, each.dtype) for name, each in self._state().items()})
            return Trained(tensors, kept.read(tuple[float, float]))

    def take(self, trained: Trained) -> None:
        """Make this what was learned, here or by another rank."""
        for site, learned in self.sites.items():
            learned.load_state_dict({name: trained.tensors[f"{site}/{name}"] for name in learned.state_dict()})

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{site}/{name}": tensor
            for site, learned in self.sites.items()
            for name, tensor in learned.state_dict().items()
        }

    @property
    def title(self) -> str:
        """The name of this block in a checkpoint."""
        return f"{TrainTransforms.name} {self.graph.name} {self.block.name}"

    def begin(self) -> None:
        """Initialise free factors from the statistics of the values they transform."""
        for stub, learned in self.owners.items():
            fact = stub_fact(stub)
            if fact is None or fact.role != "activation" or learned.rotation:
                continue
            if fact.site not in self.calibration.inputs:
                continue
            statistics = self.calibration.inputs[fact.site].to(self.on.device)
            sizes = len(learned.left), len(learned.right)
            names = [weight_name(linear) for linear in stub.users]
            moments = statistics.moments or SecondMoments(None, statistics.rows)
            tokens = moments.factor
            second = SumsOfMatrix(sizes, moments.dense()) if tokens is None else SumsOfRows(sizes, [tokens])
            weights = [rows_of(self.on.weight(self.graph.module, name).detach()) for name in names]
            learned.begin(second, SumsOfRows(sizes, weights))

    def _look(self, node: fx.Node, value: Any) -> Any:
        fact = stub_fact(node) if is_call(node, QUANT_STUB) else None
        if fact is None:
            return value
        learned = self.owners.get(node)
        if fact.role == "activation":
            inputs = inputs_at(fact, self.scheme)
            if inputs.bits == 16:
                return value if learned is None else kronecker_rows(value, *learned.factors()).to(value.dtype)
            if learned is not None:
                return learned.inputs(value, inputs).to(value.dtype)
        if fact.role == "weight":
            return self.weights[node]
        # Nothing is learned here: gradients only pass through.
        return value + (fake_quantize(value.detach(), fact, self.scheme) - value.detach())

    def _round_weights(self) -> dict[fx.Node, torch.Tensor]:
        """Weight stub -> the rounded weight that linears read, for the whole block."""
        rounding = {}
        for stub in self.block.nodes:
            fact = stub_fact(stub) if is_call(stub, QUANT_STUB) else None
            if fact is not None and fact.role == "weight":
                weight = self.on.weight(self.graph.module, _target(stub.args[0])).detach()
                # Recomputed in the backward pass (checkpointing): together it is six times the layer's weights.
                rounding[stub] = recomputed(
                    self._rounded,
                    weight,
                    self.owners.get(stub),
                    weights_at(fact, self.scheme),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
        return rounding

    def _rounded(self, weight: torch.Tensor, learned: LearnedTransform | None, scheme: WeightScheme) -> torch.Tensor:
        moved = weight if learned is None else learned.weights(weight)
        return rounded(moved, scheme.kernel_group, 1.0, scheme.bits).to(weight.dtype)

    def loss(self, batch: _Batch, targets: Values) -> torch.Tensor:
        """The error of one batch under rounding with the current factors, against the block's full-precision output."""
        self.weights = self._round_weights()
        given, valid = self.block.run(batch.values, self.on, self._look), self.on.there(batch.valid)
        losses = []
        for node in self.block.results:
            expected, found = self.on.there(targets[node]).float(), given[node].float()
            difference = found - expected
            if valid is not None and expected.shape[:2] == valid.shape:
                difference, expected = difference[valid], expected[valid]
            losses.append(difference.pow(2).sum() / expected.pow(2).sum().clamp(min=1e-12))
        return torch.stack(losses).mean()

    def mean_loss(self, fed: list[_Batch], targets: list[Values]) -> float:
        """Mean over batches."""
        with torch.no_grad():
            return float(torch.stack([self.loss(*pair) for pair in zip(fed, targets, strict=True)]).mean())

    def train(self, fed: list[_Batch], targets: list[Values], tell: Tell) -> None:
        """Adam over epochs of batches in order, one step per batch, with cosine decay of the step size.

        `tell` is called with the seconds of the second step: the first one includes what is done once.
        """
        options = self.scheme.training
        parameters = [parameter for learned in self.sites.values() for parameter in learned.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
        pairs = list(zip(fed, targets, strict=True))
        total = options.epochs * len(pairs)
        with torch.enable_grad():
            for number in range(total):
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * (1 + math.cos(math.pi * number / total)) / 2
                began = monotonic()
                optimizer.zero_grad()
                self.loss(*pairs[number % len(pairs)]).backward()
                optimizer.step()
                if number == min(1, total - 1):
                    float(parameters[0].detach().sum())  # an accelerator has computed the step by then
                    tell(step=monotonic() - began)

    def fold(self, program: Program) -> None:
        """Write the learned transform into factors, weights, shifts, clips and statistics, in all graphs."""
        with torch.no_grad():
            learned = {site: transform.factors() for site, transform in self.sites.items()}
            moved = dict[str, torch.Tensor]()
            for graph in program.graphs.values():
                if graph.owner == self.graph.owner:
                    self._fold_graph(graph, learned, moved)
            for site, (left, right) in learned.items():
                for name in self.calibration.names(site):
                    statistics = self.calibration.inputs[name].to(self.on.device)
                    moved_statistics = carried(statistics, left.double(), right.double())
                    self.calibration.inputs[name] = moved_statistics.to(self.on.home)

    def _fold_graph(
        self, graph: Graph, learned: dict[str, tuple[torch.Tensor, torch.Tensor]], moved: dict[str, torch.Tensor]
    ) -> None:
        """moved: new tensors by name, created for the first graph that has them and shared by the others."""

        def make(name: str, tensor: torch.Tensor) -> None:
            moved[name] = self.on.keep(tensor.contiguous())

        for stub in calls(graph, QUANT_STUB):
            fact = stub_fact(stub)
            node = _kronecker(stub) if fact is not None and fact.site in learned else None
            if fact is None or fact.role != "activation" or node is None:
                continue
            (left, right), module = learned[fact.site], graph.module
            first, last = _target(node.args[2]), _target(node.args[3])
            names = [first, last, *map(weight_name, stub.users)]
            if first not in moved:
                make(first, left @ self.on.weight(module, first).detach())
                make(last, self.on.weight(module, last).detach() @ right.T)
                for name in names[2:]:
                    weight = self.on.weight(module, name).detach()
                    make(name, self.sites[fact.site].weights(weight).to(weight.dtype))
            if is_call(shifted := _shifted(stub), aten.sub.Tensor):
                names.append(name := _target(shifted.args[1]))
                if name not in moved:
                    make(name, kronecker_rows(self.on.weight(module, name).detach(), left, right))
            for name in names:
                set_tensor(module, name, moved[name])
            if self.scheme.activations.bits != 16:
                set_fact(stub, replace(fact, clip=float(torch.sigmoid(self.sites[fact.site].clip))))


def _target(node: object) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)


def _kronecker(stub: fx.Node) -> fx.Node | None:
    """The transform before a stub, looking through the subtraction of a mean."""
    source = _shifted(stub)
    if is_call(source, aten.sub.Tensor):
        source = source.args[0]
    return source if is_call(source, KRONECKER) else None


def _shifted(stub: fx.Node) -> fx.Node:
    """What a stub reads, looking through a cast to the model's type."""
    source = stub.args[0]
    assert isinstance(source, fx.Node)
    return before_cast(source)
