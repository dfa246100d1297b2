"""The names of a graph's inputs and outputs, dotted paths into a component's arguments and its result, and of layers.

attention_mask    masks.full    hidden_states.2    past_key_values.3.key    past_states.2.conv.0    kept.2
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CACHE = "past_key_values"
# What a layer remembers of its past in a tensor of fixed size: the state of a convolution or a recurrence.
STATE, CROSS = "past_states", "cross"
# What cross-attention caches beside keys and values where the states it reads are cut: their numbers, i64[B, N], and
# which slots hold one, bool[B, N].
CROSS_KEPT, CROSS_ALIVE = f"{CROSS}.kept", f"{CROSS}.alive"
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)$")
"""The name of a module that is a layer; the group is its index."""


class Name(str):
    """A dotted path. It equals its text, so that tensors are looked up by either."""

    __slots__ = ()

    @property
    def root(self) -> str:
        """The first part: the argument, or the field of the result."""
        return self.partition(".")[0]

    @property
    def rest(self) -> str:
        """What follows the first part; "" for nothing."""
        return self.partition(".")[2]

    @property
    def in_cache(self) -> bool:
        """Whether it is a layer's keys or values, or the codes or scales of them."""
        return self.root == CACHE and bool(self.rest)

    @property
    def in_full_precision(self) -> bool:
        """Whether it is a layer's keys or values themselves: `past_key_values.3.key`."""
        return self.in_cache and self.count(".") == 2

    @property
    def layer(self) -> int:
        """The decoder layer of a cache entry, or the layer of a cut. Raises ValueError for another name."""
        return int(self.rest.partition(".")[0])

    @property
    def crossing(self) -> Name:
        """The name of what cross-attention caches where self-attention caches this: `past_states.3.cross.key`."""
        return Name(f"{STATE}.{self.layer}.{CROSS}.{self.part}")

    @property
    def part(self) -> str:
        """What a layer caches under the name: `key`, `value`, `key.codes`."""
        return self.rest.partition(".")[2]


def state(layer: int, part: str) -> Name:
    """The name of what a layer remembers beside keys and values: `past_states.3.cross.kept`."""
    return Name(f"{STATE}.{layer}.{part}")


def names(paths: Iterable[str]) -> tuple[Name, ...]:
    """Names of paths given as text."""
    return tuple(map(Name, paths))
