"""How far an answer of graphs is from the model's own."""

from __future__ import annotations

from typing import Any

import torch

# Largest distance of logits from the model's, of their spread, where types of 16 bits round.
HALF = 0.25


def logits_apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of logits f[B, T, V] from others, relative to the spread of those; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    wanted: Any = expected.float()
    spread: Any = wanted - wanted.mean(dim=-1, keepdim=True)
    distance: Any = found.float() - wanted
    return float(distance.norm() / spread.norm().clamp(min=1e-30))
