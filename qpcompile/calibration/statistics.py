"""Running statistics of the inputs of linears: memory depends on the model, not on the amount of data.

For a 7B model they take up to 0.7 GB per layer, more than its weights: second moments of 4,096 and 11,008 channels, and
rows. Finished statistics are therefore stored on a `Shelf`, most of them in files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qpcompile.calibration.second_moments import FACTOR, MATRIX, SHARE, SecondMoments
from qpcompile.ir.mapped_tensors import to_file
from qpcompile.ir.measurements import Measurement

# Tokens of each site that are stored unreduced, to evaluate quantizers on.
ROWS = 512
# Statistics of at least this many bytes are stored in a file.
LARGE = 2**22


@dataclass
class InputStatistics:
    """Statistics of the input of some linears.

    largest: f32[C], largest magnitude per channel; moments: sum x x^T, or None; total: f32[C], sum x;
    rows: f32[R, C], up to ROWS of the tokens; visual: bool[R], which of them are visual tokens.
    """

    largest: torch.Tensor
    moments: SecondMoments | None
    total: torch.Tensor
    rows: torch.Tensor
    visual: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, moments: bool, device: torch.device | None = None) -> InputStatistics:
        """Statistics of no tokens."""
        zeros = functools.partial(torch.zeros, device=device)
        square = SecondMoments.empty(channels, device) if moments else None
        marks = zeros(0, dtype=torch.bool)
        return cls(zeros(channels), square, zeros(channels), zeros(0, channels), marks)

    def add(
        self,
        x: torch.Tensor,
        keep: int = ROWS,
        visual: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        """Accumulate x: f[..., C]; up to `keep` of its tokens, evenly spaced, are stored.

        visual, counts: bool[...], which tokens are visual (None: all), and which count at all (None: all).
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        marks = rows.new_ones(len(rows), dtype=torch.bool) if visual is None else visual.reshape(-1)
        if counts is not None:
            rows, marks = rows[counts.reshape(-1)], marks[counts.reshape(-1)]
        if not rows.shape[0]:
            return
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        if self.moments is not None:
            self.moments = self.moments.plus(rows)
        self.total += rows.sum(dim=0)
        self.tokens += rows.shape[0]
        count = min(keep, rows.shape[0], ROWS - self.rows.shape[0])
        if count > 0:
            chosen = torch.arange(count, device=rows.device) * rows.shape[0] // count
            self.rows = torch.cat([self.rows, rows.index_select(0, chosen)])
            self.visual = torch.cat([self.visual, marks.index_select(0, chosen)])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All fields by name; second moments only if present."""
        held = {name: getattr(self, name) for name in ("largest", "total", "rows", "visual")}
        moments = {} if self.moments is None else self.moments.tensors()
        return {**held, **moments, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def of_tensors(cls, held: dict[str, torch.Tensor]) -> InputStatistics:
        """The inverse of `tensors`."""
        tokens = int(held["tokens"])
        moments = SecondMoments.of_tensors(held)
        return cls(held["largest"], moments, held["total"], held["rows"], held["visual"], tokens)

    @classmethod
    def checked(cls, held: dict[str, torch.Tensor], channels: int, moments: bool) -> InputStatistics:
        """The inverse of `tensors` for an input of `channels` channels; ValueError for anything else."""
        empty = cls.empty(channels, moments, torch.device("meta")).tensors()
        if MATRIX in held and moments:
            empty[MATRIX] = empty.pop(FACTOR).new_zeros(channels, channels)
        if set(held) != set(empty):
            raise ValueError(f"statistics have {sorted(empty)}, not {sorted(held)}")
        # Tensors of tokens, and how many there may be.
        most = {"rows": ROWS, "visual": ROWS, FACTOR: channels // SHARE}
        count = {name: len(tensor) if tensor.ndim else 0 for name, tensor in held.items()}
        for name, expected in empty.items():
            shape = (count[name], *expected.shape[1:]) if name in most else tuple(expected.shape)
            wrong = held[name].dtype != expected.dtype or tuple(held[name].shape) != shape
            if wrong or count[name] > most.get(name, channels):
                raise ValueError(f"{name} of {channels} channels is {held[name].dtype}{list(held[name].shape)}")
        if count["rows"] != count["visual"]:
            raise ValueError(f"visual of {channels} channels marks {count['visual']} of {count['rows']} rows")
        return cls.of_tensors(held)

    def copy(self) -> InputStatistics:
        """The same in memory of its own, to be added to."""
        return self.of_tensors({name: tensor.clone() for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device."""
        return self.of_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def mean(self) -> torch.Tensor:
        """The mean token, f32[C]."""
        return self.total / max(self.tokens, 1)

    def transformed(self, matrix: torch.Tensor) -> InputStatistics:
        """Statistics of `matrix @ x`, matrix: f[C, C]; the largest magnitudes are no longer known and become NaN."""
        wide = matrix.double()
        moments = None if self.moments is None else self.moments.transformed(wide)
        total, rows = (wide @ self.total.double()).float(), (self.rows.double() @ wide.T).float()
        return self._moved(moments, total, rows)

    def turned(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> InputStatistics:
        """`transformed` without materializing the matrix: `rows` applies it, f64[N, C] -> f64[N, C]."""
        moments = None if self.moments is None else self.moments.turned(rows)
        return self._moved(moments, rows(self.total.double()[None])[0].float(), rows(self.rows.double()).float())

    def shifted(self, shift: torch.Tensor) -> InputStatistics:
        """Statistics of `x - shift`, shift: f[C]; the largest magnitudes are no longer known and become NaN."""
        away, total = shift.double(), self.total.double()
        moments = None if self.moments is None else self.moments.shifted(away, total, self.tokens)
        rows = (self.rows.double() - away).float()
        total = (total - self.tokens * away).float()
        return self._moved(moments, total, rows)

    def _moved(self, moments: SecondMoments | None, total: torch.Tensor, rows: torch.Tensor) -> InputStatistics:
        unknown = torch.full_like(self.largest, torch.nan)
        return InputStatistics(unknown, moments, total, rows, self.visual, self.tokens)


class Shelf(MutableMapping[str, InputStatistics]):
    """A dict of finished statistics by site: large ones are in unlinked files of a folder (default: TMPDIR), mapped.

    Entries are never modified, only replaced; copies share them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, InputStatistics] = {}

    def __getitem__(self, site: str) -> InputStatistics:
        return self._held[site]

    def __setitem__(self, site: str, statistics: InputStatistics) -> None:
        tensors = statistics.tensors()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size >= LARGE:
            statistics = InputStatistics.of_tensors(to_file(tensors, self._folder))
        self._held[site] = statistics

    def __delitem__(self, site: str) -> None:
        del self._held[site]

    def __contains__(self, site: object) -> bool:
        return site in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __deepcopy__(self, _: dict[int, Any]) -> Shelf:
        made = Shelf(self._folder)
        made._held.update(self._held)
        return made


def expert_site(site: str, expert: int) -> str:
    """The name of the statistics of the tokens that chose one expert, at the input of experts called `site`."""
    return f"{site}[{expert}]"


def of_expert(name: str) -> bool:
    """Whether statistics with this name are of the tokens of one expert: no module path has brackets."""
    return name.endswith("]")


@dataclass
class Calibration:
    """The result of calibration: input statistics per group of sites, the loss sensitivity of visual against text
    tokens (`modality_ratios`, if the recipe needs them), and the number of samples.
    """

    inputs: Shelf = field(default_factory=Shelf)
    ratios: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    def names(self, site: str) -> list[str]:
        """The names of the statistics of a site: its own, and those of its experts, as far as there are any."""
        return [name for name in self.inputs if name == site or name.startswith(f"{site}[")]


CALIBRATION: Measurement[Calibration] = Measurement("calibration")
