"""Determine where the rows of a vision tower go, from the recorded run: which become visual tokens of the sequence, and
what the states are of that cross-attention reads.

    tower output [pictures, 1 + P, C] -> without its first row -> projector -> rows of the embeddings, in their order
    tower output [pictures, P, C] -> (projector) -> states of cross-attention, in their order

Models with more processing on the host (separators between rows of patches, cropped tiles, merged patches) have no such
path; pruning methods that score by the tower's attention refuse them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qpcompile.capture.record import Recording
from qpcompile.capture.sample import PICTURES as PIXELS
from qpcompile.ir.program import Graph
from qpcompile.ir.structure import named_tensors
from qpcompile.pruning.states import find_inner, inner_sources, states_input
from qpcompile.pruning.visual_rows import OUTPUT, SKIPPED
from qpcompile.runtime.model_inputs import DECODER_IDS, IDS
from qpcompile.runtime.prepare import PICTURES, PROMPT, STATES_OF

# Components that make rows of pictures.
PICTURE_PARTS = ("vision", "projector")


def visual_path(recording: Recording, ids: torch.Tensor | None, tokens: torch.Tensor) -> dict[str, Any]:
    """Constants of the vision graph (qpcompile/pruning/visual_rows.py); empty if there is no such path.

    Args:
        ids: i64[B, S], the prompt of the recorded run.
        tokens: i64[n], the ids of picture placeholder tokens.
    """
    language = recording.first("language")
    embeds = language.inputs.get("inputs_embeds") if language else None
    if not isinstance(embeds, torch.Tensor) or ids is None or embeds.shape[:2] != ids.shape:
        return {}
    visual = embeds[torch.isin(ids, tokens)]
    towers = _results(recording, "vision")
    projectors = [call for call in recording.calls if call.component == "projector"]
    if not projectors:
        names = [name for name in towers[0] if _same_rows([tower[name] for tower in towers], visual)]
        return {OUTPUT: names[0], SKIPPED: 0} if names else {}
    if len(projectors) != len(towers):
        return {}
    projected = [next(iter(result.values())) for result in _results(recording, "projector")]
    if not _same_rows(projected, visual):
        return {}
    taken = [tensor for call in projectors for _, tensor in list(named_tensors(call.inputs))[:1]]
    for name in towers[0]:
        skipped = {_skipped(tower[name], rows) for tower, rows in zip(towers, taken, strict=True)}
        if len(skipped) == 1 and None not in skipped:
            return {OUTPUT: name, SKIPPED: skipped.pop()}
    return {}


def rows_of_states(
    prefill: Graph, recording: Recording, prompt: dict[str, Any], tokens: torch.Tensor
) -> dict[str, str]:
    """The constant STATES_OF of a prefill graph; empty where it has no cross-attention, or what it reads is not known.

    States are of pictures alone if they are the rows of a tower or a projector, or if there was nothing else to compute
    them from; they are of the encoder's prompt if it has picture tokens, and each of its tokens a state.
    """
    path, call = states_input(prefill), recording.first("language")
    if path is None and (inner := find_inner(prefill)) is not None:
        sources = inner_sources(prefill, inner)
        return {STATES_OF: PICTURES} if sources and all(name.startswith(PIXELS) for name in sources) else {}
    if path is None or call is None:
        return {}
    states = dict(named_tensors(call.inputs))[path]
    ids, rows = prompt.get(IDS), states.flatten(0, -2)
    for part in PICTURE_PARTS:
        # An encoder of prompt and pictures may be in the tower's place.
        with_text = any(each.component == part and each.inputs.get(IDS) is not None for each in recording.calls)
        made = [] if with_text else _results(recording, part)
        for name in made[0] if made else ():
            if all(name in each for each in made) and _same_rows([each[name] for each in made], rows):
                return {STATES_OF: PICTURES}
    if prompt.get(DECODER_IDS) is None:
        return {}
    if ids is None:
        return {STATES_OF: PICTURES}
    is_prompt = states.shape[:2] == ids.shape and bool(torch.isin(ids, tokens).any())
    return {STATES_OF: PROMPT} if is_prompt else {}


def _results(recording: Recording, component: str) -> list[dict[str, torch.Tensor]]:
    """The results of every call of a component, by name."""
    return [
        {path or "output": tensor for path, tensor in named_tensors(call.output)}
        for call in recording.calls
        if call.component == component
    ]


def _skipped(whole: torch.Tensor, taken: torch.Tensor) -> int | None:
    """How many leading rows of each picture are missing in `taken`; None if it is not a part of `whole`."""
    if whole.ndim != taken.ndim or whole.ndim < 2 or whole.shape[-2] < taken.shape[-2]:
        return None
    skipped = whole.shape[-2] - taken.shape[-2]
    rest = whole.narrow(-2, skipped, taken.shape[-2])
    return skipped if rest.shape == taken.shape and torch.equal(rest, taken) else None


def _same_rows(parts: Sequence[torch.Tensor], rows: torch.Tensor) -> bool:
    """Whether the rows of `parts` are `rows: f[N, C]` in order, up to a factor that models may apply."""
    if any(part.ndim < 2 or part.shape[-1] != rows.shape[1] for part in parts):
        return False
    found = torch.cat([part.flatten(0, -2) for part in parts]).to(rows.device, torch.float32)
    return found.shape == rows.shape and bool((torch.cosine_similarity(found, rows.float()) > 0.999).all())
