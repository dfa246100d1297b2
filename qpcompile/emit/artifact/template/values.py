"""Abstract values of the template analysis: sizes, and the effect of one loop iteration (see `template/sizes.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

# The assumed size of a caller's text or list.
GIVEN = 1


@dataclass(frozen=True)
class TextSize:
    """plain: the size. carry: how often the loop-carried value is contained. number: certainly not text."""

    plain: float = GIVEN
    carry: float = 0
    number: bool = False

    def __add__(self, other: TextSize) -> TextSize:
        return TextSize(self.plain + other.plain, self.carry + other.carry, self.number and other.number)

    def __or__(self, other: TextSize) -> TextSize:
        """The maximum of two alternatives."""
        return TextSize(max(self.plain, other.plain), max(self.carry, other.carry), self.number and other.number)

    def times(self, factor: float) -> TextSize:
        """The size of `factor` repetitions."""
        return TextSize(self.plain * factor, self.carry * factor, self.number)


Scope = dict[str, TextSize]


@dataclass
class Iteration:
    """The namespace attributes set in one loop iteration, with their largest sizes.

    fresh: values independent of the previous iteration. grown: values that contain an older one plus this much.
    """

    fresh: Scope = field(default_factory=dict)
    grown: Scope = field(default_factory=dict)

    def sets(self, name: str, size: TextSize) -> None:
        """Record that an attribute is set."""
        kind = self.grown if size.carry else self.fresh
        kind[name] = size | kind.get(name, size)
