"""Towers that VisionZip and PruMerge+ support, and those they refuse, each with its reason."""

from __future__ import annotations

import pytest
import torch
from programs import changed_recipe, fresh, traced
from torch import nn

from qpcompile.errors import PlanError
from qpcompile.ir.program import PREFILL, PROJECTOR, VISION, Program
from qpcompile.pruning.tower import add_tower_outputs
from qpcompile.pruning.visual_rows import OUTPUT, SKIPPED
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES


class Gelu(nn.Module):
    """No attention at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


class Attending(nn.Module):
    """A tower of one layer over f[B, T, 6]; `hides` puts a mask into its attention."""

    def __init__(self, hides: bool, behind: nn.Module) -> None:
        super().__init__()
        self.hides, self.out, self.behind = hides, nn.Linear(6, 6), behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.hides else None
        found = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return self.behind(self.out(found.transpose(1, 2).flatten(2)))


class Halves(nn.Module):
    """Merges every two rows into one with interleaved channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, 2)).transpose(-1, -2).flatten(2)


def with_tower(module: nn.Module) -> Program:
    """The tiny LLaVA with another tower, and no projector."""
    program = fresh(changed_recipe("none", "tokens.method=visionzip", "tokens.keep=0.5"))
    program.graphs[VISION] = traced(module, {"x": torch.randn(2, 8, 6)}, name=VISION)
    program.graphs[VISION].constants |= {OUTPUT: "y", SKIPPED: 0}
    del program.graphs[PROJECTOR]
    return program


def test_another_tower_is_read() -> None:
    program = with_tower(Attending(hides=False, behind=nn.GELU()))
    add_tower_outputs(program, joined_heads=False)
    assert program.graphs[VISION].outputs == ("y", VISUAL_SCORES, VISUAL_KEYS)
    assert program.graphs[PREFILL].inputs[-2:] == (VISUAL_SCORES, VISUAL_KEYS)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Gelu(), "no attention layer"),
        (Attending(hides=True, behind=nn.GELU()), "hides some patches"),
        (Attending(hides=False, behind=Halves()), "cannot be traced"),
    ],
)
def test_refuses_a_tower_that_cannot_be_read(module: nn.Module, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        add_tower_outputs(with_tower(module), joined_heads=False)


def test_refuses_what_the_host_or_the_projector_does_besides() -> None:
    program = fresh(changed_recipe("none", "tokens.method=visionzip", "tokens.keep=0.5"))
    pair = {"image_features": torch.randn(2, 8, 32)}
    program.graphs[PROJECTOR] = traced(Pairs(), pair, name=PROJECTOR)
    with pytest.raises(PlanError, match="the projector moves patches"):
        add_tower_outputs(program, joined_heads=False)
    program.graphs[VISION].constants.pop(OUTPUT)
    with pytest.raises(PlanError, match="LlavaForConditionalGeneration does more with patches"):
        add_tower_outputs(program, joined_heads=False)


class Pairs(nn.Module):
    """Merges two neighbours into one row."""

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return image_features.reshape(image_features.shape[0], -1, 64)
