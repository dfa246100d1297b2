"""How the next token is chosen: the generation settings that a runner without torch honours, and the list of the rest.

Each step works on logits f[B, V] as transformers' processors of the same name do, in their order: penalties, tokens
that must not come, then temperature, top_k and top_p where `do_sample` asks for chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.folder import RunnerError

Array = np.ndarray[Any, Any]

# Settings that `Choice` honours.
# fmt: off
HONOURED = frozenset(
    (
        "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_length", "min_new_tokens",
        "suppress_tokens", "begin_suppress_tokens", "eos_token_id", "pad_token_id", "max_new_tokens",
    )
)
# fmt: on
# Settings that change nothing in one answer to each prompt, found one token at a time, or say what is returned besides.
# fmt: off
WITHOUT_EFFECT = frozenset(
    (
        "max_length", "use_cache", "early_stopping", "length_penalty", "output_scores", "output_logits",
        "output_attentions", "output_hidden_states", "return_dict_in_generate", "renormalize_logits", "bos_token_id",
        "remove_invalid_values", "decoder_start_token_id", "low_memory", "disable_compile", "compile_config",
        "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "transformers_version",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "assistant_ensemble_weight",
    )
)
# fmt: on
# Settings that only chance reads.
OF_CHANCE = frozenset(["min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"])
# Values beside None and False with which a setting asks for nothing.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
}
MOST_NEW, DEFAULT_NEW = 2**20, 32


def unserved(settings: Mapping[str, Any]) -> list[str]:
    """Settings, as `generation_config.json` has them, that would be ignored: `name=value` each."""
    found = []
    for name, value in sorted(settings.items()):
        idle = value is None or value is False or value in NOTHING.get(name, ())
        greedy = name in OF_CHANCE and not settings.get("do_sample")
        if not (idle or greedy or name.startswith("_") or name in HONOURED | WITHOUT_EFFECT):
            found.append(f"{name}={value!r}"[:100])
    return found


@dataclass(frozen=True)
class Choice:
    """The settings of `generation_config.json`; every number was checked. `new` is how long an answer may be."""

    ends: tuple[int, ...]
    pad: int
    new: int
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    penalty: float
    least: int
    least_in_all: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @classmethod
    def read(cls, settings: Mapping[str, Any], vocabulary: int, where: str) -> Choice:
        """The choice that settings ask for; RunnerError for one that is not honoured or is not a number of its kind."""
        if names := unserved(settings):
            raise RunnerError(f"this runner cannot honour {', '.join(names)}", where, "use the compiled module")
        number = _Numbers(settings, where)
        ends = number.tokens("eos_token_id", vocabulary)
        pad = number.tokens("pad_token_id", vocabulary) or ends[:1] or (0,)
        return cls(
            ends=ends,
            pad=pad[0],
            new=number.whole("max_new_tokens", DEFAULT_NEW, 1, MOST_NEW),
            sample=settings.get("do_sample") is True,
            temperature=number.real("temperature", 1.0, 1e-9, 1e9),
            top_k=number.whole("top_k", 50, 0, 2**40),
            top_p=number.real("top_p", 1.0, 0.0, 1.0),
            penalty=number.real("repetition_penalty", 1.0, 1e-3, 1e3),
            least=number.whole("min_new_tokens", 0, 0, MOST_NEW),
            least_in_all=number.whole("min_length", 0, 0, MOST_NEW),
            suppressed=number.tokens("suppress_tokens", vocabulary),
            suppressed_first=number.tokens("begin_suppress_tokens", vocabulary),
        )

    def next(self, logits: Array, ids: Array, prompt: int, chance: np.random.Generator) -> Array:
        """The next token of each row, i64[B]. logits: f[B, V]; ids: i64[B, S], the first `prompt` of them asked."""
        scores = logits.astype(np.float32)
        if self.penalty != 1:
            seen = np.take_along_axis(scores, ids, axis=1)
            np.put_along_axis(scores, ids, np.where(seen < 0, seen * self.penalty, seen / self.penalty), axis=1)
        new = ids.shape[1] - prompt
        if new < self.least or ids.shape[1] < self.least_in_all:
            scores[:, list(self.ends)] = -np.inf
        scores[:, list(self.suppressed)] = -np.inf
        if new == 0:
            scores[:, list(self.suppressed_first)] = -np.inf
        if not self.sample:
            return scores.argmax(-1)
        return np.array([chance.choice(len(row), p=row) for row in self.shares(scores)], np.int64)

    def shares(self, scores: Array) -> Array:
        """How probable each token is, f[B, V], where chance chooses; scores: f[B, V]."""
        scores = scores.astype(np.float64) / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            scores[scores < np.sort(scores, axis=1)[:, [-self.top_k]]] = -np.inf
        shares = _softmax(scores)
        if self.top_p < 1:
            order = np.argsort(shares, axis=1, kind="stable")
            below = np.cumsum(np.take_along_axis(shares, order, axis=1), axis=1) <= 1 - self.top_p
            below[:, -1] = False
            unwanted = np.zeros_like(below)
            np.put_along_axis(unwanted, order, below, axis=1)
            shares = _softmax(np.where(unwanted, -np.inf, scores))
        return shares


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class _Numbers:
    """Reads settings; what is not a number of the kind asked for is a RunnerError."""

    settings: Mapping[str, Any]
    where: str

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number."""
        value = self.settings.get(name)
        return default if value is None else whole(value, name, least, most, self.where)

    def real(self, name: str, default: float, least: float, most: float) -> float:
        """A number."""
        value = self.settings.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise _no_number(value, name, least, most, self.where)
        return float(value)

    def tokens(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """Ids of tokens: one, a list, or none."""
        value = self.settings.get(name)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(whole(each, name, 0, vocabulary - 1, self.where) for each in listed)


def whole(value: Any, name: str, least: int, most: int, where: str) -> int:
    """`value`, if it is a whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise _no_number(value, name, least, most, where)
    return int(value)


def _no_number(value: Any, name: str, least: float, most: float, where: str) -> RunnerError:
    upper = f"{most:g}" if math.isfinite(most) else "more"
    return RunnerError(f"{name} is {value!r}"[:200], where, f"give a number from {least:g} to {upper}")
