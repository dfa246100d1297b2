"""Samples with the full-precision model's answers, ready to be given to other models in one prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qpcompile.errors import CalibrationError
from qpcompile.ir.program import Graph, Program
from qpcompile.progress import track
from qpcompile.quality.answers import Answer, answer
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement
from qpcompile.runtime.recorded_answer import RecordedAnswer


@dataclass(frozen=True)
class Answered:
    """One sample and its answer of T tokens.

    full: the answer. feeds: inputs of the prefill graph for the prompt and all tokens of the answer but the last, S in
    all; its last T rows predict the answer. visual, valid, asked: bool[B, S], the visual tokens, those that are not
    padding, and those of the prompt.
    """

    full: Answer
    feeds: dict[str, torch.Tensor]
    visual: torch.Tensor
    valid: torch.Tensor
    asked: torch.Tensor


def record_answers(program: Program, samples: Iterable[dict[str, Any]], count: int, most: int) -> list[Answered]:
    """Greedy answers of at most `most` tokens, by the program's graphs as they are, without quantization.

    The embeddings of all samples are in memory. Raises CalibrationError if there is no sample.
    """
    ranks, own = program.ranks, list[Answered]()
    with (
        Machine(program, Placement.of(program).run) as machine,
        track("answers to compare with", count, shown=ranks.leads) as step,
    ):
        for number, sample in enumerate(samples):
            if ranks.mine(number):
                own.append(_answered(machine, sample, most))
            step()
    if not (found := ranks.merged(own)):
        raise CalibrationError("there is no calibration sample", where="calibration", do="give at least one sample")
    return found


def _answered(machine: Machine, sample: dict[str, Any], most: int) -> Answered:
    recorded, made = RecordedAnswer(machine), list[Answered]()
    with recorded.recording():
        full = answer(machine, sample, most)

    def take(graph: Graph, feeds: dict[str, torch.Tensor]) -> None:
        batch, length = feeds["inputs_embeds"].shape[:2]
        visual, valid = machine.marks(batch, length)
        asked = valid.clone()
        asked[:, length - full.tokens.shape[1] + 1 :] = False
        made.append(Answered(full, feeds, visual, valid, asked))

    recorded.run_whole(sample, take)
    return made[0]
