"""Static scales per modality, and the mask that selects between them, also after token cuts."""

from __future__ import annotations

import torch
from families import IMAGE
from programs import HERE, captured, changed_recipe, fresh

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.ir.edit import calls
from qpcompile.ir.operators import QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, VISION, Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.quantization.static_scales import static_scales
from qpcompile.recipe.quantize import ActivationScheme
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import VISUAL, Machine, execute_graph


def quantized(*settings: str) -> Program:
    _, cases, _ = captured()
    recipe = changed_recipe("w4a4kv4", "quantize.activations.granularity=modality", *settings)
    program = fresh(recipe)
    first = [Canonicalize(), InsertQuantStubs(), Calibrate([cases["one"]], 1), FoldTransforms()]
    run_passes(program, [*first, PlanTokenBudget(), InsertTokenCuts(), QuantizeWeights()])
    return program


def scales_seen(program: Program) -> list[torch.Tensor]:
    """The scale of each token at each site of the prefill graph, f32[B, N, 1]."""
    _, cases, _ = captured()
    seen: list[torch.Tensor] = []

    def look(node, args, found):  # noqa: ANN001, ANN202
        if node.target is QUANTIZE_STATIC:
            seen.append(found[1])
        return found

    def execute(graph, feeds):  # noqa: ANN001, ANN202
        return run_watched(graph, feeds, look, HERE) if graph.name == PREFILL else execute_graph(graph, feeds)

    Machine(program, execute).prefill(cases["one"])
    return seen


def test_one_scale_for_each_modality() -> None:
    statistics = InputStatistics.empty(2, moments=False)
    rows, visual = torch.tensor([[7.0, 1.0], [1.0, -3.5], [0.7, 0.1]]), torch.tensor([True, True, False])
    statistics.add(rows, visual=visual)
    assert torch.allclose(static_scales(statistics, torch.eye(2), ActivationScheme()), torch.tensor([1.0, 0.1]))
    searched = static_scales(statistics, torch.eye(2), ActivationScheme(clip_search=True))
    assert (searched <= torch.tensor([1.0, 0.1]) + 1e-6).all()


def test_a_scale_of_8_bits() -> None:
    statistics = InputStatistics.empty(1, moments=False)
    statistics.add(torch.tensor([[254.0]]))
    assert static_scales(statistics, torch.eye(1), ActivationScheme(bits=8)).tolist() == [2.0, 2.0]


def test_a_modality_that_was_never_seen_takes_the_other_scale() -> None:
    statistics = InputStatistics.empty(1, moments=False)
    statistics.add(torch.tensor([[14.0]]))
    assert static_scales(statistics, torch.eye(1), ActivationScheme()).tolist() == [2.0, 2.0]


def test_prefill_chooses_by_the_mask() -> None:
    _, cases, _ = captured()
    program = quantized()
    visual = cases["one"]["input_ids"][0] == IMAGE
    seen = scales_seen(program)
    assert len(seen) > 6 and not list(calls(program.graphs[PREFILL], QUANTIZE_DYNAMIC))
    for scale in seen:
        flat = scale[0, :, 0]
        assert len(flat[visual].unique()) == len(flat[~visual].unique()) == 1
    assert VISUAL in program.graphs[PREFILL].inputs and VISUAL not in program.graphs[DECODE].inputs
    assert list(calls(program.graphs[VISION], QUANTIZE_STATIC))


def test_mask_follows_the_cuts() -> None:
    _, cases, _ = captured()
    program = quantized("tokens.method=random", "tokens.keep=0.5", "tokens.candidate_layers=[0, 1]")
    total = int((cases["one"]["input_ids"] == IMAGE).sum())
    text = cases["one"]["input_ids"].shape[1] - total
    lengths, kinds = set(), []
    for scale in scales_seen(program):
        flat = scale[0, :, 0]
        lengths.add(len(flat))
        kinds.append(sorted(int((flat == kind).sum()) for kind in flat.unique()))
    assert len(lengths) == 3
    assert all(text in counts for counts in kinds), "text tokens keep their scale behind every cut"
