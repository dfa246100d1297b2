"""The statistics of one layer's sites, while calls of several ranks go through it.

Each site belongs to one rank. After a turn, in which each rank makes at most one call, the others send it their values
of the site, and it adds them in the order of the samples: the sums are those of a single process, to the last bit.
Values are sent and not sums, since a call's second moments are larger than its values if it has fewer tokens than the
site has channels; and the work of adding is spread over the ranks like that of the calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qpcompile.calibration.statistics import InputStatistics, of_expert
from qpcompile.errors import CalibrationError
from qpcompile.ranks import Ranks, Tensors, shares


class SiteSums:
    """See the module's docstring.

    Args:
        widths: channels of every site.
        moments: whether second moments are collected.
        keep: tokens of a call that are stored unreduced.
        before: the finished statistics so far. Graphs of one component for several sets of values share their sites:
            the sums of a later one go on from those of an earlier one.
    """

    def __init__(
        self,
        ranks: Ranks,
        widths: Mapping[str, int],
        moments: bool,
        keep: int,
        before: Mapping[str, InputStatistics],
    ) -> None:
        self.ranks, self.widths, self.moments, self.keep, self.before = ranks, widths, moments, keep, before
        self._growing: dict[str, InputStatistics] = {}
        self._owners = dict(zip(widths, shares([width**2 for width in widths.values()], ranks.size), strict=True))
        self._parcels: list[Tensors] = [{} for _ in range(ranks.size)]

    def add(
        self, site: str, value: torch.Tensor, visual: torch.Tensor | None = None, counts: torch.Tensor | None = None
    ) -> None:
        """One value of this rank's call. visual, counts: bool[...], see InputStatistics.add."""
        if self.ranks.size == 1:
            self._add(site, value, visual, counts)
            return
        parcel = self._parcels[self._owners[site]]
        parts = {"value": value, "visual": visual, "counts": counts}
        # A number first: a call may have several values of one site.
        number = len(parcel)
        parcel.update({f"{number}/{kind}/{site}": part for kind, part in parts.items() if part is not None})

    def end_turn(self, turn: Sequence[int]) -> None:
        """Add what the ranks of a turn have called, in this order. All ranks must call it."""
        if self.ranks.size == 1:
            return
        found = self.ranks.delivered(self._parcels)
        for rank in turn:
            for name, value in found[rank].items():
                number, kind, site = name.split("/", 2)
                if kind == "value":
                    marks = (found[rank].get(f"{number}/{mark}/{site}") for mark in ("visual", "counts"))
                    self._add(site, value, *marks)
        self._parcels = [{} for _ in range(self.ranks.size)]

    def take(self, home: torch.device) -> dict[str, InputStatistics]:
        """The finished statistics of all sites that were called, on all ranks, in the order of the graphs; at home.

        Raises CalibrationError for numbers that are not finite, or whose second moments are not.
        """
        grown, self._growing = self._growing, {}
        for site, statistics in grown.items():
            # Squares of finite numbers may be infinite.
            sums = statistics.largest if statistics.moments is None else statistics.moments.diagonal
            if not torch.isfinite(sums).all():
                raise CalibrationError(
                    "calibration produced numbers that are not finite",
                    where=site,
                    do="check the samples and the model's weights for NaN and infinity",
                )
        tensors = {
            f"{name}/{site}": tensor
            for site, statistics in grown.items()
            for name, tensor in statistics.to(home).tensors().items()
        }
        found: dict[str, Tensors] = {}
        for own in self.ranks.shared(tensors):
            for name, tensor in own.items():
                kind, _, site = name.partition("/")
                found.setdefault(site, {})[kind] = tensor
        return {site: InputStatistics.of_tensors(found[site]) for site in self.widths if site in found}

    def _add(self, site: str, value: torch.Tensor, visual: torch.Tensor | None, counts: torch.Tensor | None) -> None:
        if site not in self._growing:
            found = self.before.get(site)
            empty = InputStatistics.empty(value.shape[-1], self.moments, value.device)
            self._growing[site] = empty if found is None else found.copy().to(value.device)
        # Of the tokens of an expert, only the moments are read.
        self._growing[site].add(value, 0 if of_expert(site) else self.keep, visual, counts)
