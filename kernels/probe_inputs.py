"""Inputs of the operators' probes (kernels/<op>/spec.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(*shape: int, device: torch.device) -> Tensor:
    """Deterministic noise, identical on every machine: f32[shape] in -1..1."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7).reshape(shape).to(device)


def choice(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features f32[2, 7, 12], which of them are counted, and the budget per row."""
    counted = torch.arange(7, device=device).expand(2, 7) < 5
    return noise(2, 7, 12, device=device), counted, torch.tensor([3, 2], device=device)
