"""Greedy answers with their distributions, and the comparison of two models token by token.

The second model is given the answer of the first, so that every position has the same text before it. It would give the
same greedy answer by itself if, and only if, its likeliest token is the given one at every position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from qpcompile.runtime.generation_options import plain_settings
from qpcompile.runtime.machine import Machine

# Logits kept per position; the probability of all other tokens is kept as one number.
LIKELIEST = 64


@dataclass(frozen=True)
class Answer:
    """The greedy answer of a model to B prompts.

    tokens: i64[B, T]. counted: bool[B, T], false after a row's end. likeliest: i64[B, T, K], descending.
    logs: f32[B, T, K + 1], log-probabilities of these, and of all other tokens together.
    """

    tokens: torch.Tensor
    counted: torch.Tensor
    likeliest: torch.Tensor
    logs: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """Sums over B answers.

    answers: their number, and `equal_answers` those without a different token. tokens, equal_tokens: the same by token.
    divergence: KL(full || compiled) in nats, summed over tokens; a lower bound, since unlikely tokens count as one.
    """

    answers: int = 0
    equal_answers: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    divergence: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.answers + other.answers,
            self.equal_answers + other.equal_answers,
            self.tokens + other.tokens,
            self.equal_tokens + other.equal_tokens,
            self.divergence + other.divergence,
        )


class _Given(LogitsProcessor):
    """Makes `generate` choose the tokens of an answer, i64[B, T], whatever the logits are."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, float("-inf"))
        chosen.scatter_(1, self.tokens[:, self.step, None].to(scores.device), 0.0)
        self.step += 1
        return chosen  # type: ignore[return-value]


def answer(machine: Machine, sample: dict[str, Any], most: int) -> Answer:
    """The greedy answer to a sample, of at most `most` tokens."""
    tokens, logits = _generate(machine, sample, most)
    ends = torch.isin(tokens, _ends(machine))
    return answer_of(tokens, ends.cumsum(1) - ends.long() == 0, torch.stack(logits, dim=1))


def answer_of(tokens: torch.Tensor, counted: torch.Tensor, logits: torch.Tensor) -> Answer:
    """tokens: i64[B, T], counted: bool[B, T], logits: f[B, T, vocabulary]."""
    logs = logits.float().log_softmax(-1)
    top = logs.topk(min(LIKELIEST, logs.shape[-1]))
    return Answer(tokens, counted, top.indices, _with_rest(top.values))


def compare(machine: Machine, sample: dict[str, Any], full: Answer) -> Agreement:
    """How far a model agrees with the answer of another to the same sample."""
    _, logits = _generate(machine, sample, full.tokens.shape[1], full.tokens)
    return agreement(full, torch.stack(logits, dim=1))


def agreement(full: Answer, logits: torch.Tensor) -> Agreement:
    """logits: f[B, T, vocabulary] of another model that was given the answer."""
    logs = logits.float().log_softmax(-1)
    same = (logs.argmax(-1) == full.likeliest[..., 0]) | ~full.counted
    ours = _with_rest(logs.gather(-1, full.likeliest))
    # A token that is impossible in both distributions contributes nothing.
    terms = torch.where(full.logs.isneginf(), 0.0, full.logs.exp() * (full.logs - ours))
    return Agreement(
        answers=len(same),
        equal_answers=int(same.all(dim=1).sum()),
        tokens=int(full.counted.sum()),
        equal_tokens=int((same & full.counted).sum()),
        divergence=float(terms.sum(-1)[full.counted].double().sum()),
    )


def free_answer(machine: Machine, sample: dict[str, Any], most: int) -> torch.Tensor:
    """i64[B, T], the greedy answer by the model's own tokens."""
    return _generate(machine, sample, most)[0]


def _generate(
    machine: Machine, sample: dict[str, Any], most: int, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(i64[B, T], logits f[B, vocabulary] of each of the T steps)."""
    wanted = {"max_new_tokens": most, "output_logits": True, "return_dict_in_generate": True}
    if given is not None:
        wanted["logits_processor"] = LogitsProcessorList([_Given(given)])
    result = machine.generate(**{**sample, **plain_settings(machine.host), **wanted})
    # What stands before the answer is the prompt, or of a model with an encoder the decoder's own first token.
    return result.sequences[:, -len(result.logits) :], list(result.logits)


def _ends(machine: Machine) -> torch.Tensor:
    """i64[n], the tokens that end an answer."""
    ids = machine.host.generation_config.eos_token_id
    return torch.tensor([] if ids is None else ids, dtype=torch.int64, device=machine.host.device).flatten()


def _with_rest(logs: torch.Tensor) -> torch.Tensor:
    """f32[..., K + 1]: log-probabilities f32[..., K], and that of everything else, at least the rounding error."""
    rest = (1 - logs.double().exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([logs, rest.log().float()], dim=-1)
