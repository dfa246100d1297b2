"""The pass pipeline: every pass of a compile, in order. Read this first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qpcompile.ir.pass_manager import Pass
from qpcompile.passes.assign_bits import AssignBits
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.center_keys import CenterKeys
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.fuse_cache_writes import FuseCacheWrites
from qpcompile.passes.fuse_kernels import FuseKernels
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.measure_sensitivity import MeasureSensitivity
from qpcompile.passes.merge_duplicates import MergeDuplicates
from qpcompile.passes.merge_linears import MergeLinears
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
    """The passes for `count` calibration samples; a pass that the recipe does not need changes nothing."""
    return [
        # Canonicalize, and mark quantizable values.
        Canonicalize(),
        InsertQuantStubs(),
        # Calibrate, and transform linear inputs to remove outliers.
        Calibrate(samples, count),
        FoldTransforms(),
        CenterKeys(samples, count),
        AssignBits(samples, count),
        SearchClips(),
        TrainTransforms(samples, count),
        MeasureSensitivity(samples, count),
        SearchSchedule(samples, count),
        # Plan how many visual tokens each layer keeps, and insert the token cuts.
        PlanTokenBudget(),
        InsertTokenCuts(),
        Recalibrate(samples, count),
        # Quantize, then fuse operators and eliminate common subexpressions.
        SimulateQvlm(),
        QuantizeWeights(),
        QuantizeHead(),
        QuantizeKvCache(),
        FuseKernels(),
        MergeDuplicates(),
        MergeLinears(),
        FuseCacheWrites(),
        # Make all back ends produce identical codes.
        WidenSums(),
    ]
