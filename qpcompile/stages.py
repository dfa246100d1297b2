"""The stages of a compile, in order. A stage decides which passes may run and which operators are legal in graphs.

| stage | has been done |
| --- | --- |
| `captured` | components are traced |
| `canonical` | graphs hold no leftovers of tracing; norms are one node |
| `stubbed` | every value that may be quantized is marked by a stub |
| `calibrated` | statistics are collected at the stubs |
| `transformed` | the basis of linear inputs is changed, clip ratios and sensitivities are known |
| `planned` | the plan says how many tokens each cut keeps |
| `cut` | token cuts are inserted |
| `packed` | weights are quantized |
| `quantized` | the KV cache is quantized; no stub is left |
| `fused` | operators are fused |
"""

from __future__ import annotations

from typing import Literal, get_args

Stage = Literal[
    "captured",
    "canonical",
    "stubbed",
    "calibrated",
    "transformed",
    "planned",
    "cut",
    "packed",
    "quantized",
    "fused",
]
STAGES: tuple[Stage, ...] = get_args(Stage)


def within(stage: Stage, first: Stage, last: Stage) -> bool:
    """Whether a stage lies between two, both included."""
    return STAGES.index(first) <= STAGES.index(stage) <= STAGES.index(last)


def span(first: Stage, last: Stage) -> str:
    """The stages between two, both included, in words."""
    return f"the stage {first}" if first == last else f"the stages {first} to {last}"
