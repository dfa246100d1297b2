"""How one family is made tiny: what `shrink.py` cannot know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pictures as make
from pictures import Inputs, Pictures


def one_size(config: Any) -> Pictures:
    """Squares of the size that the tower is made for."""
    whole = getattr(config, "encoder", config)
    tower = getattr(whole, "vision_config", whole)
    size = getattr(tower, "image_size", 32)
    return make.stacked(size[0] if isinstance(size, (list, tuple)) else size)


@dataclass(frozen=True)
class Family:
    """How one family is made tiny.

    changes: configuration values by dotted key. pictures: given the configuration. types: the input that marks visual
    tokens; by default the one that `forward` takes. around: token ids before and after a picture. tokens: visual tokens
    of every picture where the model has no `get_image_features`. beside: further inputs, of those made so far.
    needs: packages of the tower. text, several: whether prompts without a picture, and with two, are answered.
    """

    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    pictures: Callable[[Any], Pictures] = one_size
    types: str | None = "auto"
    around: tuple[list[int], list[int]] = ([], [])
    tokens: int | None = None
    beside: Callable[[Inputs], Inputs] = dict
    needs: tuple[str, ...] = ()
    text: bool = True
    several: bool = True
