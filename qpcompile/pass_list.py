"""THE LIST: every pass of a compile, in order. Read this first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qpcompile.ir.pass_manager import Pass
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.fuse_kernels import FuseKernels
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.measure_sensitivity import MeasureSensitivity
from qpcompile.passes.merge_duplicates import MergeDuplicates
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.passes.quantize_head import QuantizeHead
from qpcompile.passes.quantize_kv_cache import QuantizeKvCache
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.passes.recalibrate import Recalibrate
from qpcompile.passes.search_clips import SearchClips
from qpcompile.passes.search_schedule import SearchSchedule
from qpcompile.passes.simulate_qvlm import SimulateQvlm
from qpcompile.passes.train_transforms import TrainTransforms
from qpcompile.passes.widen_sums import WidenSums


def passes(samples: Iterable[dict[str, Any]], count: int) -> list[Pass]:
    """The passes for `count` calibration samples; what a recipe does not ask for changes nothing."""
    return [
        # One spelling per idea, and a mark wherever something may be quantized.
        Canonicalize(),
        InsertQuantStubs(),
        # Measure, and change the basis of linear inputs so that 4 bits hold them.
        Calibrate(samples, count),
        FoldTransforms(),
        SearchClips(),
        TrainTransforms(samples, count),
        MeasureSensitivity(samples, count),
        SearchSchedule(samples, count),
        # Decide how many visual tokens each layer keeps, and drop the others.
        PlanTokenBudget(),
        InsertTokenCuts(),
        Recalibrate(samples, count),
        # Make it small, then make it few operators.
        SimulateQvlm(),
        QuantizeWeights(),
        QuantizeHead(),
        QuantizeKvCache(),
        FuseKernels(),
        MergeDuplicates(),
        # Make every back end come to the same codes.
        WidenSums(),
    ]
