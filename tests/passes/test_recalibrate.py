"""Statistics after token cuts: only tokens that a layer still has, and no padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import IMAGE
from programs import captured, changed_recipe, fresh

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.passes.recalibrate import Recalibrate

Apply = Callable[[Program, Recalibrate], bool]
LAYERS = "model.language_model.layers"


def cut(*settings: str, sample: str = "one") -> Program:
    """The captured LLaVA, calibrated and cut after layer 0 to half of its visual tokens."""
    _, cases, _ = captured()
    keys = ("tokens.method=random", "tokens.keep=0.5", "tokens.candidate_layers=[0]")
    program = fresh(changed_recipe("w4a4kv4", *keys, *settings))
    first = [Canonicalize(), InsertQuantStubs(), Calibrate([cases[sample]], 1), FoldTransforms()]
    run_passes(program, [*first, PlanTokenBudget(), InsertTokenCuts()])
    return program


def test_only_kept_tokens_count(apply: Apply) -> None:
    _, cases, _ = captured()
    program = cut("calibration.after_cuts=true")
    before = program.measured[CALIBRATION].inputs
    assert not apply(program, Recalibrate([cases["one"]], 1))
    after = program.measured[CALIBRATION].inputs
    assert before.keys() == after.keys()
    length, visual = cases["one"]["input_ids"].shape[1], int((cases["one"]["input_ids"] == IMAGE).sum())
    assert after[f"{LAYERS}.0.mlp.down_proj"].tokens == length
    assert after[f"{LAYERS}.1.mlp.down_proj"].tokens == length - visual // 2
    assert int(after[f"{LAYERS}.1.mlp.down_proj"].visual.sum()) == visual - visual // 2
    # Before the cut nothing has changed except that the samples are run in the new basis.
    name = f"{LAYERS}.0.self_attn.q_proj"
    found, expected = after[name].moments, before[name].moments
    assert found is not None and expected is not None
    assert torch.allclose(found.dense(), expected.dense(), rtol=1e-2, atol=1e-2)


def test_stage_wise_order_recalibrates(apply: Apply) -> None:
    _, cases, _ = captured()
    program = cut("order=prune_then_quantize")
    Recalibrate([cases["one"]], 1).run(program)
    tokens = {program.measured[CALIBRATION].inputs[f"{LAYERS}.{layer}.mlp.down_proj"].tokens for layer in (0, 1)}
    assert len(tokens) == 2


@pytest.mark.parametrize("settings", [(), ("calibration.after_cuts=true", "tokens.method=none", "tokens.keep=1.0")])
def test_nothing_to_do(apply: Apply, settings: tuple[str, ...]) -> None:
    _, cases, _ = captured()
    program = cut(*settings)
    before = program.measured[CALIBRATION]
    assert not apply(program, Recalibrate([cases["one"]], 1))
    assert program.measured[CALIBRATION] is before


def test_padding_does_not_count() -> None:
    _, cases, _ = captured()
    batch = cases["padded"]
    assert not bool(batch["attention_mask"].all()), "the batch has padding"
    program = fresh(changed_recipe("w4a4kv4"))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([batch], 1)])
    found = program.measured[CALIBRATION].inputs[f"{LAYERS}.1.mlp.down_proj"]
    assert found.tokens == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
