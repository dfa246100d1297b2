"""Determine what the inputs of pictures are in a prompt without any, where the decoder was traced with pictures.

transformers leaves such inputs out: masks of picture tokens, features of pictures, what cross-attention reads. A traced
graph has them. Zeros are tried in their place, of no row or of one, and taken if the answer is the model's: the nearer
of both, where types of 16 bits round.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from qpcompile.capture.logits import HALF, logits_apart
from qpcompile.capture.record import TWO_TOKENS
from qpcompile.capture.sample import ROWS
from qpcompile.errors import QPCompileError
from qpcompile.ir.names import CACHE, STATE
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.runtime.arguments import POSITIONS
from qpcompile.runtime.generation_options import plain_settings
from qpcompile.runtime.machine import REFUSALS, Machine, visual_tokens
from qpcompile.runtime.model_inputs import is_encoder_decoder
from qpcompile.runtime.prepare import ABSENT, DEEPSTACK, EMBEDDINGS, MASK, STATES_OF

# Inputs that every prompt has, or that are made without being told how.
_USUAL = (CACHE, STATE, POSITIONS, DEEPSTACK, EMBEDDINGS, MASK)
# Largest distance of logits, of their spread, in float32.
_EXACT = 1e-3


def learn_absent(program: Program, model: Any, sample: dict[str, Any]) -> None:
    """Add to the constants of the decoder's graphs how many rows of zeros stand for inputs of pictures, if any do."""
    graphs = program.language
    prompt = text_alone(model, sample)
    if prompt is None or not any(map(_of_pictures, graphs)):
        return
    try:
        expected = cast(Any, model).generate(**prompt, **TWO_TOKENS).logits
    except Exception:  # noqa: BLE001 - a model that needs pictures says so in its own way
        return
    # A cut needs a state to score, so one of zeros stands for those that cross-attention reads.
    counts = (1, 0) if STATES_OF in program.graphs[PREFILL].constants else (0, 1)
    nearest, best = HALF if program.host.dtype != torch.float32 else _EXACT, None
    for count in counts:
        told = [dataclasses.replace(graph, constants=graph.constants | _told(graph, count)) for graph in graphs]
        tried = dataclasses.replace(program, graphs=program.graphs | {graph.name: graph for graph in told})
        far = far_from_model(tried, prompt, torch.stack(expected, dim=1))
        if far < nearest:
            nearest, best = far, count
        if far <= _EXACT:
            break
    if best is not None:
        for graph in graphs:
            graph.constants |= _told(graph, best)


def text_alone(model: Any, sample: dict[str, Any]) -> dict[str, Any] | None:
    """Two rows of a prompt with text in place of its picture tokens; None for a model without prompts of that kind."""
    ids = sample.get("input_ids")
    if ids is None or is_encoder_decoder(model):
        return None
    visual = torch.isin(ids, visual_tokens(model.config))
    text = ids[~visual]
    if not text.numel():
        return None
    prompt = {key: value for key, value in sample.items() if key in ROWS}
    prompt["input_ids"] = torch.where(visual, text[-1], ids)
    prompt |= {key: torch.zeros_like(prompt[key]) for key in prompt if key.endswith("token_type_ids")}
    return {key: torch.cat([value, value]) for key, value in prompt.items()}


def _of_pictures(graph: Graph) -> list[str]:
    return [name for name in graph.inputs if name.root not in _USUAL]


def _told(graph: Graph, count: int) -> dict[str, int]:
    return {f"{ABSENT}.{name}": count for name in _of_pictures(graph)}


def far_from_model(program: Program, prompt: dict[str, Any], expected: torch.Tensor) -> float:
    """How far the graphs' answer to a prompt is from the model's, infinitely if they give none."""
    try:
        with Machine(program) as machine:
            answer = machine.generate(**prompt, **(plain_settings(program.host) | TWO_TOKENS))
    except (QPCompileError, *REFUSALS):
        return float("inf")
    return logits_apart(torch.stack(answer.logits, dim=1), expected)
