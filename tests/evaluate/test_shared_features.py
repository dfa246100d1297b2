"""A tower runs once for recipes that share it, and again for one that changes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qpcompile.capture.data_folder import read_questions
from qpcompile.evaluate.run.evaluation import question_inputs
from qpcompile.evaluate.run.shared_features import SharedFeatures, tensors_digest
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.ir.program import VISION, Graph
from qpcompile.recipe.recipe import Recipe

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
DATA = TESTBED / "calibration" / "llava"


@pytest.mark.slow
def test_rows_share_a_tower() -> None:
    bench, features, ran = Workbench(str(TESTBED / "llava"), DATA), SharedFeatures(), []
    inputs = question_inputs(bench.processor, read_questions(DATA)[:3])

    def answers(*settings: str) -> torch.Tensor:
        compiled = bench.compile(Recipe.load("none").with_overrides([*settings, "calibration.samples=1"]))
        alone = compiled.generate(**inputs, max_new_tokens=3, do_sample=False)
        execute = compiled.machine.execute

        def counted(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            ran.append(graph.name == VISION)
            return execute(graph, feeds)

        compiled.machine.execute = counted
        features.serve(compiled)
        assert compiled.generate(**inputs, max_new_tokens=3, do_sample=False).equal(alone)
        return alone

    full = answers()
    assert sum(ran) == 1
    answers("tokens.method=random_input", "tokens.keep=0.1")
    assert sum(ran) == 1
    four_bits = answers("quantize.weights.solver=rtn", "quantize.activations.bits=16", "quantize.kv_cache.bits=16")
    assert sum(ran) == 2
    # The second tower evicted the first: one at a time.
    assert answers().equal(full) and sum(ran) == 3
    assert four_bits.shape == full.shape


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([1.0, 3.0])},
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
    ],
)
def test_digest_sees_names_types_shapes_and_contents(changed: dict[str, torch.Tensor]) -> None:
    same = {"a": torch.tensor([1.0, 2.0])}
    assert tensors_digest(same) == tensors_digest({"a": torch.tensor([[1.0, 2.0]])[0]})
    assert tensors_digest(same) != tensors_digest(changed)
