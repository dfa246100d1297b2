"""Groups of rows of one recipe over its seeds, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qpcompile.evaluate.run.rows import Row
from qpcompile.evaluate.sweep.sweep import CellResult


@dataclass(frozen=True)
class Key:
    """The position of a group in tables and figures."""

    bed: str
    quantizer: str
    pruner: str
    share: float
    ablation: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Group:
    """The rows of one table entry, one per seed; none if the recipe was refused."""

    key: Key
    rows: tuple[Row, ...]
    error: str = ""

    @property
    def marks(self) -> NDArray[np.float64]:
        """f64[questions]: mean mark of each question over the seeds."""
        return np.mean([row.marks for row in self.rows], axis=0)

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return float(np.mean([row.accuracy for row in self.rows]))

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the seeds; 0 for one seed."""
        return float(np.std([row.accuracy for row in self.rows], ddof=1)) if len(self.rows) > 1 else 0.0

    def mean(self, field: str) -> float:
        """Mean over the seeds of one numeric field of the rows."""
        return float(np.mean([getattr(row, field) for row in self.rows]))


def groups(results: Sequence[CellResult]) -> list[Group]:
    """The groups of a sweep, in the order of its plan."""
    rows: dict[Key, list[Row]] = {}
    errors: dict[Key, str] = {}
    for result in results:
        cell = result.cell
        key = Key(cell.bed.name, cell.quantizer, cell.pruner, cell.share, cell.ablation, cell.variant)
        found = rows.setdefault(key, [])
        if result.row is None:
            errors[key] = result.error
        else:
            found.append(result.row)
    return [Group(key, tuple(found), errors.get(key, "")) for key, found in rows.items()]


def full_precision(found: Sequence[Group], bed: str) -> Group:
    """The model itself on one bed."""
    return next(group for group in found if group.key.bed == bed and not group.key.quantizer)


def factorial(found: Sequence[Group], bed: str, quantizer: str) -> list[Group]:
    """All combinations of pruner and share with one quantizer, without ablations."""
    return [g for g in found if (g.key.bed, g.key.quantizer, g.key.ablation) == (bed, quantizer, None)]


def ablation(found: Sequence[Group], bed: str, name: str) -> list[Group]:
    """The base and the variants of an ablation on one bed."""
    return [g for g in found if g.key.bed == bed and g.key.ablation == name]
