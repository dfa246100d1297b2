"""VisionZip and PruMerge+ on the trained testbeds: what is kept of real pictures, in batches of several sizes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qpcompile
from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.capture.load import load_model
from qpcompile.compiled import CompiledVLM
from qpcompile.ir.program import VISION, Graph
from qpcompile.pruning.pruner import INPUT
from qpcompile.runtime.machine import VISUAL_SCORES, Machine

TESTBED = Path(__file__).parents[1] / "testbed"
SHARES = {"visionzip": 10 / 64, "prumerge_plus": 3 / 4}
KEEP, QUESTIONS = 0.3, 4


@functools.cache
def compiled(bed: str, method: str) -> CompiledVLM:
    model, processor = load_model(TESTBED / bed)
    processor.tokenizer.padding_side = "left"
    settings = [f"tokens.method={method}", f"tokens.keep={KEEP}"]
    return qpcompile.compile(model, qpcompile.Recipe.load("none").with_overrides(settings), processor=processor)


def chosen(scores: np.ndarray[Any, Any], share: float) -> list[int]:
    """Which of a prompt's visual tokens are kept: the best, and others at equal steps."""
    keep = int(np.ceil(len(scores) * KEEP - 1e-9))
    spaced = int(np.floor(keep * share + 0.5))
    best = np.argsort(-scores, kind="stable")[: keep - spaced].tolist()
    rest = [i for i in range(len(scores)) if i not in best]
    return sorted(best + [rest[step * len(rest) // spaced] for step in range(spaced)])


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARES)
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_kept_tokens_of_real_pictures(bed: str, method: str) -> None:
    model = compiled(bed, method)
    questions = read_questions(TESTBED / "calibration" / bed)[:QUESTIONS]
    batch = question_inputs(model.processor, questions)
    ids = batch["input_ids"]
    seen: list[torch.Tensor] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = graph(feeds)
        if graph.name == VISION:
            seen.append(results[VISUAL_SCORES])
        return results

    with torch.no_grad():
        cache = Machine(model.program, execute).prefill(dict(batch))
    kept = cache.kept[INPUT].masked_fill(~cache.alive[INPUT], -1)
    visual = ids == model.config.image_token_id
    scores = torch.cat(seen).split(visual.sum(dim=1).tolist())
    for row, question in enumerate(questions):
        places = visual[row].nonzero().flatten().tolist()
        expected = {places[i] for i in chosen(scores[row].numpy(), SHARES[method])}
        assert set(kept[row].tolist()) & set(places) == expected
        alone = model.kept_tokens(**question_inputs(model.processor, [question]))[INPUT][0]
        padding = int((batch["attention_mask"][row] == 0).sum())
        assert [i - padding for i in kept[row].tolist() if i >= 0] == alone.tolist()
