"""What a compile costs: agreement with the full-precision model on samples, and the share that each step loses.

The full-precision graphs answer before any pass; the rewritten graphs are compared after the token cuts, after the
quantization of weights (without and with the rounding of activations), and at the end as they are deployed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from qpcompile.ir.operators import (
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    LINEAR_INT,
    LINEAR_W4A16,
    LINEAR_W8A16,
    QUANTIZE_DYNAMIC,
    QUANTIZE_STATIC,
)
from qpcompile.ir.program import Graph, Program
from qpcompile.progress import track
from qpcompile.quality.answers import Agreement, Answer, answer, compare, free_answer
from qpcompile.recipe.plan import Example, Loss, Quality
from qpcompile.runtime.machine import Execute, Machine, visual_tokens
from qpcompile.runtime.model_inputs import IDS
from qpcompile.runtime.placement import PlacedInterpreter, Placement, run_placed

# Answers of both models that are shown side by side, and the characters of each.
SHOWN, CHARACTERS = 3, 200
CUTS, WEIGHTS, ACTIVATIONS, CACHE = "token cuts", "weights", "activations", "cache"


class QualityMeter:
    """Compares a program with what it was before its passes.

    Args:
        samples: model inputs; `count` of them. They can be iterated repeatedly.
        apart: whether calibration did not see them.
        processor: turns answers into text; without one none are shown.
    """

    def __init__(self, samples: Iterable[dict[str, Any]], count: int, apart: bool, processor: Any) -> None:
        self.samples, self.count, self.apart, self.processor = samples, count, apart, processor
        self._full: list[Answer] = []
        self._losses: list[Loss] = []

    def before(self, program: Program) -> None:
        """Store the answers of the full-precision graphs."""
        most, ranks = program.recipe.quality.tokens, program.ranks
        on, own = Placement.of(program), list[Answer]()
        with (
            Machine(program, on.run) as machine,
            track("answers in full precision", self.count, shown=ranks.leads) as step,
        ):
            for number, sample in enumerate(self.samples):
                if ranks.mine(number):
                    own.append(answer(machine, sample, most))
                step()
        self._full = ranks.merged(own)

    def after(self, name: str, program: Program) -> None:
        """Measure what is lost up to the pass that has just run, if it ends one of the steps."""
        scheme = program.recipe.quantize
        if name == "insert_token_cuts" and program.plan.cuts:
            self._add(CUTS, program, Placement.of(program).run)
        if name != "quantize_head" or scheme is None:
            return
        if scheme.weights.bits < 16:
            self._add(WEIGHTS, program, _unrounded(Placement.of(program)))
        if scheme.activations.bits < 16:
            self._add(ACTIVATIONS, program, Placement.of(program).run)

    def finish(self, machine: Machine, raised: tuple[str, ...] = ()) -> Quality:
        """The result for the program as it is deployed; `raised`: overrides that the compile made to reach it."""
        final, answers = self._compare(machine)
        scheme = machine.program.recipe.quantize
        if scheme is not None and scheme.kv_cache.bits < 16:
            self._losses.append(_loss(CACHE, final))
        return Quality(
            samples=final.answers,
            apart=self.apart,
            equal_answers=final.equal_answers,
            tokens=final.tokens,
            equal_tokens=final.equal_tokens,
            divergence=_digits(final.divergence / final.tokens),
            losses=tuple(self._losses),
            raised=raised,
            examples=self._examples(machine, answers),
        )

    def _add(self, cause: str, program: Program, execute: Execute) -> None:
        with Machine(program, execute) as machine:
            self._losses.append(_loss(cause, self._compare(machine)[0]))

    def _compare(self, machine: Machine) -> tuple[Agreement, list[Agreement]]:
        """The sum over all samples, and each sample's own."""
        ranks, own = machine.program.ranks, list[Agreement]()
        with track("agreement", self.count, shown=ranks.leads) as step:
            for number, (sample, full) in enumerate(zip(self.samples, self._full, strict=True)):
                if ranks.mine(number):
                    own.append(compare(machine, sample, full))
                step()
        found = ranks.merged(own)
        return sum(found, Agreement()), found

    def _examples(self, machine: Machine, answers: list[Agreement]) -> tuple[Example, ...]:
        """Answers of both models, different ones first; none without a processor."""
        if not hasattr(self.processor, "batch_decode"):
            return ()
        order = sorted(range(len(answers)), key=lambda place: answers[place].equal_answers == answers[place].answers)
        chosen = set(order[:SHOWN])
        made: dict[int, Example] = {}
        for place, sample in enumerate(self.samples):
            if place in chosen:
                full = self._full[place].tokens
                ours = free_answer(machine, sample, full.shape[1])
                ids = sample.get(IDS, torch.empty(1, 0, dtype=torch.int64))[:1]
                words = ~torch.isin(ids, visual_tokens(machine.host.config).to(ids.device))
                prompt = self._text(ids[words][None])
                made[place] = Example(prompt=prompt, full=self._text(full), compiled=self._text(ours))
        return tuple(made[place] for place in order[:SHOWN])

    def _text(self, tokens: torch.Tensor) -> str:
        """The first row of tokens, on one line."""
        text = self.processor.batch_decode(tokens[:1], skip_special_tokens=True)[0]
        return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:CHARACTERS]


def _loss(cause: str, found: Agreement) -> Loss:
    return Loss(
        cause=cause, equal_answers=found.equal_answers, divergence=_digits(found.divergence / max(found.tokens, 1))
    )


def _digits(number: float) -> float:
    """Four significant digits: the others depend on the order of sums."""
    return float(f"{max(number, 0.0):.4g}")


def _unrounded(on: Placement) -> Execute:
    """Runs graphs whose linears have quantized weights, on activations that are not rounded."""

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return run_placed(_Unrounded(graph, on), feeds)

    return execute


class _Unrounded(PlacedInterpreter):
    """Skips quantizers of activations; their readers get the values themselves."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        if target in (QUANTIZE_DYNAMIC, QUANTIZE_STATIC):
            return args[0], None
        if target is LINEAR_INT:
            x, _, stored, scale, bias, dtype, _, *residual = args
            y = _product(x.to(dtype), stored, scale, bias)
            return y + residual[0] if residual else y
        if target is EXPERT_LINEAR_INT:
            x, _, stored, scale, index, dtype, _ = args
            return EXPERT_LINEAR_A16(x.to(dtype), stored, scale, index)
        return super().call_function(target, args, kwargs)


def _product(x: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: f[..., K], a weight as it is stored, scale: f32[N, G], bias: f[N] -> x.dtype[..., N]."""
    if stored.dtype == torch.uint8:
        return LINEAR_W4A16(x, stored, scale, bias)
    if scale.shape[1] == 1:
        return LINEAR_W8A16(x, stored, scale, bias)
    dense = (stored.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return functional.linear(x, dense.to(x.dtype), bias)
