"""Batch calibration samples: left-pad shorter prompts, concatenate pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

PROMPT, MASK = "input_ids", "attention_mask"


def batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first sample, batch) of up to `size` neighbours at a time.

    Samples whose inputs differ in name or shape are not batched.
    """
    held: list[dict[str, Any]] = []
    first = 0
    for sample in samples:
        if held and (len(held) == size or not _alike(held[0], sample)):
            yield first, _together(held)
            first, held = first + len(held), []
        held.append(sample)
    if held:
        yield first, _together(held)


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys() or PROMPT not in first:
        return False
    return all(_fits(key, first, second) for key in first)


def _fits(key: str, first: dict[str, Any], second: dict[str, Any]) -> bool:
    one, other = first[key], second[key]
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or not one.ndim:
        return False
    if _of_tokens(one, first) and _of_tokens(other, second):
        return True
    return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype


def _of_tokens(value: torch.Tensor, sample: dict[str, Any]) -> bool:
    """Whether a tensor has one entry per token of the prompt, [B, S]."""
    return value.shape == sample[PROMPT].shape


def _together(samples: list[dict[str, Any]]) -> dict[str, Any]:
    if len(samples) == 1:
        return samples[0]
    length = max(sample[PROMPT].shape[1] for sample in samples)
    masked = [{MASK: torch.ones_like(sample[PROMPT]), **sample} for sample in samples]
    return {key: torch.cat([_padded(key, sample, length) for sample in masked]) for key in masked[0]}


def _padded(key: str, sample: dict[str, Any], length: int) -> torch.Tensor:
    value: torch.Tensor = sample[key]
    if not _of_tokens(value, sample):
        return value
    # A prompt ends with text: its last token is not a picture placeholder, in any tokenizer.
    filler = value[:, -1:] if key == PROMPT else torch.zeros_like(value[:, -1:])
    return torch.cat([filler.expand(-1, length - value.shape[1]), value], dim=1)
