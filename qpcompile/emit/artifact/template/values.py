"""Sizes of values in a Jinja template, and what one turn of a loop does to them: see `template/sizes.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a caller's text or list counts.
GIVEN = 1


@dataclass(frozen=True)
class Size:
    """plain: how large. carry: how often what the turn of the loop began with is in it. number: surely no text."""

    plain: float = GIVEN
    carry: float = 0
    number: bool = False

    def __add__(self, other: Size) -> Size:
        return Size(self.plain + other.plain, self.carry + other.carry, self.number and other.number)

    def __or__(self, other: Size) -> Size:
        """The larger of two that may both be."""
        return Size(max(self.plain, other.plain), max(self.carry, other.carry), self.number and other.number)

    def times(self, factor: float) -> Size:
        """So often the same."""
        return Size(self.plain * factor, self.carry * factor, self.number)


Scope = dict[str, Size]


@dataclass
class Turn:
    """What one turn of a loop sets in namespaces, largest size by attribute.

    fresh: values that hold nothing of what the turn began with. grown: values that hold an older one and this much.
    """

    fresh: Scope = field(default_factory=dict)
    grown: Scope = field(default_factory=dict)

    def sets(self, name: str, size: Size) -> None:
        """Note that an attribute is set."""
        kind = self.grown if size.carry else self.fresh
        kind[name] = size | kind.get(name, size)
