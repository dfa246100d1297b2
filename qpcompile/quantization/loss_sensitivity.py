"""What an error at the output of a linear costs: the divergence of the answer's first token, in nats.

    KL  ~  1/2 sum over tokens t of  (||g_t||^2 / N) ||error of y_t||^2         y_t: f[N], the linear's output

g_t = dL / dy_t for the gradient v = sqrt(p) z - p (sqrt(p) . z) of the logits, z normal: E[v v^T] is the Fisher matrix
of the softmax, diag(p) - p p^T. Errors of tokens and channels are taken as independent, and those of channels as
equally large. Visual and text tokens are summed separately. Linears of the tower and the projector come before the
decoder's inputs, where the host calls them: a relative error of their output counts as the same relative error of the
visual embeddings.

Source: HAWQ-V2 (arXiv 1911.03852), section 3, weighs the errors of layers by the trace of the Hessian in this way;
here the trace is of the Fisher matrix at each linear's output, from one random vector per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from qpcompile.calibration.blocks import run_nodes
from qpcompile.calibration.collect import run_sample
from qpcompile.ir.edit import is_call
from qpcompile.ir.measurements import Measurement
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import EXPERT_LINEAR
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.ir.shapes import value as shape_of
from qpcompile.progress import track
from qpcompile.quantization.products import PRODUCTS
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement

SAMPLES = 16


@dataclass
class LossSensitivity:
    """Nats per squared error, means over samples. linears: of an error with this energy at every visual and at every
    text token; features: of the squared relative error of the visual embeddings.
    """

    linears: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: float = 0.0


LOSS_SENSITIVITY: Measurement[LossSensitivity] = Measurement("loss sensitivity")


def loss_sensitivity(program: Program, samples: Iterable[dict[str, Any]], count: int, title: str) -> LossSensitivity:
    """Measured on the first SAMPLES of `count` samples.

    The backward pass reads all weights of the decoder: on an accelerator they must fit together.
    """
    count, on = min(count, SAMPLES), Placement.of(program)
    measured = _Gradients(program, on)

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if graph.name != PREFILL:
            return on.run(graph, feeds)
        visual, valid = machine.marks(*feeds["inputs_embeds"].shape[:2])
        return measured.add(graph, feeds, on.there(visual), on.there(valid))

    with Machine(program, execute) as machine, track(title, count, shown=program.ranks.leads) as step:
        for number, sample in enumerate(islice(samples, count)):
            run_sample(machine, sample, number)
            step()
    rows = max(measured.rows, 1)
    linears = {site: (sums[0] / rows, sums[1] / rows) for site, sums in measured.sums.items()}
    return LossSensitivity(linears, measured.features / rows)


class _Gradients:
    """Sums over prompts of 1/2 ||g||^2 / N, by linear and modality."""

    def __init__(self, program: Program, on: Placement) -> None:
        self.head, self.on = program.graphs.get(HEAD), on
        self.sums: dict[str, list[float]] = {}
        self.features, self.rows = 0.0, 0
        self.drawn = torch.Generator().manual_seed(0)

    def add(
        self, prefill: Graph, feeds: dict[str, torch.Tensor], visual: torch.Tensor, valid: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One call of the decoder, forward and backward; returns its results."""

        def look(node: fx.Node, value: Any) -> Any:
            fact = stub_fact(node.args[1]) if is_call(node, *PRODUCTS) else None  # type: ignore[arg-type]
            if fact is None or not value.requires_grad:
                return value
            # f[B S, J, O]: a token chooses J of the E experts, and errors are those of all rows of the weight.
            routed = is_call(node, EXPERT_LINEAR) and len(value) == visual.numel()
            experts = len(shape_of(node.args[1])) if routed else 1  # type: ignore[arg-type]
            if routed or value.shape[:-1] == visual.shape:
                value.register_hook(lambda gradient: self._note(fact.site, gradient / experts**0.5, visual, valid))
            return value

        with torch.enable_grad():
            given = {name: feed.detach() for name, feed in feeds.items()}
            embeddings = given["inputs_embeds"].requires_grad_()
            results = run_nodes(prefill, given, self.on, look)
            last = next(iter(results.values()))[:, -1:]
            if self.head is not None:
                (name,) = self.head.inputs
                last = next(iter(run_nodes(self.head, {name: last}, self.on, None).values()))
            logits = last[:, -1].float()
            logits.backward(self._fisher_factor(logits.detach()))
        gradient, tokens = self.on.there((embeddings.grad, embeddings.detach()))
        chosen = visual & valid
        if gradient is not None and chosen.any():
            energy = tokens[chosen].float().square().sum(dim=-1).mean()
            self.features += float(gradient[chosen].float().square().sum() / gradient.shape[-1] * energy) / 2
        self.rows += len(visual)
        return {path: result.detach() for path, result in self.on.back(results).items()}

    def _note(self, site: str, gradient: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor) -> None:
        size = gradient.float().square().mean(dim=-1).reshape(*visual.shape, -1).sum(dim=-1) / 2
        sums = self.sums.setdefault(site, [0.0, 0.0])
        for place, chosen in enumerate((visual & valid, valid & ~visual)):
            sums[place] += float(size[chosen].sum())

    def _fisher_factor(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: f32[B, vocabulary] -> a random vector whose covariance is diag(p) - p p^T."""
        shares = functional.softmax(logits, dim=-1)
        root = shares.sqrt() * torch.randn(logits.shape, generator=self.drawn).to(logits.device)
        return root - shares * root.sum(dim=-1, keepdim=True)
