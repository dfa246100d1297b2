"""The processes that share one compile: ranks, as torch.distributed names them. By default there is one.

Every rank runs the same passes on the same program. A pass gives each rank a part of its work and afterwards all ranks
all results, so that they stay equal. Sums are formed in the order of the samples, each by one rank: they do not depend
on the number of ranks, to the last bit. Rank 0 alone writes files and shows progress (`leads`).

What is exchanged: tensors, in `delivered`, and small Python objects, in `gathered`, between processes of one user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from qpcompile.errors import RankError

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")
S = TypeVar("S")

# Items of `spread` per rank and window: enough to find some of like cost, and few results that wait.
WINDOW = 8


@dataclass
class Lost:
    """Which rank has ended before its work was done, once that is known."""

    known: threading.Event = field(default_factory=threading.Event)
    rank: int | None = None

    def note(self, rank: int) -> None:
        """Note the first one: others end because of it."""
        if self.rank is None:
            self.rank = rank
        self.known.set()


@dataclass(frozen=True)
class Ranks:
    """See the module's docstring. `lost` is filled by who watches the other ranks (qpcompile/torchrun.py)."""

    rank: int = 0
    size: int = 1
    lost: Lost = field(default_factory=Lost, compare=False)

    def __deepcopy__(self, memo: object) -> Ranks:
        """The same: a copy of a program is computed by the same processes, and what waits for them has no copy."""
        return self

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether the sample or item with this number is this rank's."""
        return number % self.size == self.rank

    def closes(self, number: int) -> bool:
        """Whether each rank has had one item of the last `size`, this one included."""
        return number % self.size == self.size - 1

    def gathered(self, value: T) -> list[T]:
        """Each rank's value, in rank order. Raises RankError if a rank has ended."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._exchanging():
            distributed.all_gather_object(found, value)
        return found

    def merged(self, own: list[T]) -> list[T]:
        """All ranks' results of the items that are each one's (`mine`), in the order of the items."""
        found = self.gathered(own)
        return [results[turn] for turn in range(len(found[0])) for results in found if turn < len(results)]

    def delivered(self, parcels: Sequence[Tensors]) -> list[Tensors]:
        """`parcels[r]` goes to rank r; returns what came from each rank, in rank order. All ranks must call it.

        Tensors may be of any type and shape; they arrive on the device that they were sent from, the first of its kind
        in use here. Raises RankError if a rank has ended.
        """
        if self.size == 1:
            return list(parcels)
        facts = [{name: _Fact.of(tensor) for name, tensor in parcel.items()} for parcel in parcels]
        expected = [each[self.rank] for each in self.gathered(facts)]
        found = [{name: fact.empty() for name, fact in each.items()} for each in expected]
        found[self.rank] = parcels[self.rank]
        others = [other for other in range(self.size) if other != self.rank]
        with self._exchanging():
            # Tags pair the tensors up; those without elements are not sent. gloo reads `sent` until its work is done.
            sent = {other: [_host_bytes(tensor) for tensor in parcels[other].values()] for other in others}
            work = [
                distributed.isend(part, other, tag=tag)
                for other, parts in sent.items()
                for tag, part in enumerate(parts)
                if part.numel()
            ]
            work += [
                distributed.irecv(tensor.view(-1).view(torch.uint8), other, tag=tag)
                for other in others
                for tag, tensor in enumerate(found[other].values())
                if tensor.numel()
            ]
            for each in work:
                if each is not None:
                    each.wait()
        for other in others:
            for name, fact in expected[other].items():
                found[other][name] = found[other][name].to(fact.device)
        return found

    def shared(self, tensors: Tensors) -> list[Tensors]:
        """Each rank's tensors, in rank order. Raises RankError if a rank has ended."""
        return self.delivered([tensors] * self.size)

    def agree(self, what: str, told: Callable[[], str]) -> None:
        """Raise RankError if the ranks are not told the same text; `what` names it."""
        if self.size == 1:
            return
        text = told()
        for other, theirs in enumerate(self.gathered(text)):
            if theirs != text:
                here, there = _first_difference(text, theirs)
                raise RankError(
                    f"{what} must be the same on all ranks: rank {other} has {there}, rank {self.rank} has {here}",
                    where=f"rank {self.rank} of {self.size}",
                    do="start all ranks with one command, on machines with the same files, packages and processors",
                )

    def spread(self, items: Iterable[S], cost: Callable[[S], float], work: Callable[[S], T]) -> Generator[tuple[S, T]]:
        """(item, result) in the order of the items; each is worked on by one rank, and all get the result.

        Ranks work on items of like cost at the same time: those of a window are sorted by `cost`. Results are pickled.
        """
        if self.size == 1:
            yield from ((item, work(item)) for item in items)
            return
        for window in windows(items, WINDOW * self.size):
            found: dict[int, Any] = {}
            order = sorted(range(len(window)), key=lambda place: cost(window[place]), reverse=True)
            for places in windows(order, self.size):
                own = work(window[places[self.rank]]) if self.rank < len(places) else None
                found.update(zip(places, self.gathered(own), strict=False))
            for place, item in enumerate(window):
                yield item, found.pop(place)

    @contextmanager
    def _exchanging(self) -> Generator[None]:
        """An exchange that fails because a rank has ended becomes a RankError that names it."""
        try:
            yield
        except RuntimeError as error:
            self.lost.known.wait(_SECONDS_UNTIL_KNOWN)
            raise ended(self, str(error)) from error


_SECONDS_UNTIL_KNOWN = 2.0


def ended(ranks: Ranks, cause: str = "") -> RankError:
    """The error of a rank that cannot go on, since another one has ended."""
    if (lost := ranks.lost.rank) is None:
        what = f"an exchange with the other ranks failed: {(cause.strip() or 'no reason given').splitlines()[0]}"
    else:
        what = f"rank {lost} has ended before the compile was done, so this rank ends too"
    return RankError(
        what,
        where=f"rank {ranks.rank} of {ranks.size}",
        do="read what that rank printed; if it printed nothing, it was killed (out of memory?). The same command "
        "begins anew, and with --resume continues where this one ended",
    )


def turns(numbers: Sequence[Sequence[int]]) -> list[list[int]]:
    """numbers[r]: the samples of rank r's calls, ascending -> the ranks that make one call each, turn by turn.

    In a turn each rank makes at most one call. Read in order, turn by turn, the calls are in the order of the samples.
    """
    order = sorted((number, rank) for rank, own in enumerate(numbers) for number in own)
    found: list[list[int]] = []
    for _, rank in order:
        if not found or rank in found[-1]:
            found.append([])
        found[-1].append(rank)
    return found


def shares(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each item, so that the costs of all ranks are alike: the largest goes to who has least so far."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owner = min(range(size), key=loads.__getitem__)
        owners[place] = owner
        loads[owner] += costs[place]
    return owners


def windows(items: Iterable[S], size: int) -> Generator[list[S]]:
    """Items in groups of `size`, the last one shorter."""
    rest = iter(items)
    while window := list(islice(rest, size)):
        yield window


@dataclass(frozen=True)
class _Fact:
    """What the receiver of a tensor must know."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Fact:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def _host_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in host memory: gloo sends no others."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _first_difference(own: str, theirs: str) -> tuple[str, str]:
    """The first line that differs, of both; shortened."""
    ours, others = own.splitlines(), theirs.splitlines()
    pairs = zip([*ours, ""], [*others, ""], strict=False)
    here, there = next(((a, b) for a, b in pairs if a != b), ("more lines", "fewer lines"))
    return here.strip()[:120] or "nothing", there.strip()[:120] or "nothing"
