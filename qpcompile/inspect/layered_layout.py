"""Layered layout of an acyclic graph, in rows from top to bottom: each node below everything it reads.

Rows by longest path, order in a row by the barycentre of neighbours, then positions pulled towards neighbours without
overlap: "Methods for Visual Understanding of Hierarchical System Structures" (Sugiyama, Tagawa, Toda, 1981).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """`places[node]`: (middle x, row); `routes[source, target]`: middle x in every row that an edge passes."""

    places: Mapping[str, tuple[float, int]]
    routes: Mapping[tuple[str, str], tuple[float, ...]]
    width: float
    rows: int


@dataclass
class _Rows:
    """Rows of nodes, with a dummy node for each edge in each row that it crosses."""

    rows: list[list[str]]
    widths: dict[str, float]
    above: dict[str, list[str]] = field(default_factory=dict)
    below: dict[str, list[str]] = field(default_factory=dict)
    chains: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def join(self, upper: str, lower: str) -> None:
        self.below.setdefault(upper, []).append(lower)
        self.above.setdefault(lower, []).append(upper)


def place(sources: Mapping[str, Sequence[str]], widths: Mapping[str, float], gap: float) -> Layout:
    """Positions of nodes given in topological order; widths and gap in pixels."""
    ranks = _ranks(sources)
    rows = _with_stand_ins(sources, ranks, dict(widths))
    for sweep in range(_SWEEPS):
        _order(rows, downwards=sweep % 2 == 0)
    middle = {name: x for row in rows.rows for name, x in zip(row, _packed(row, rows.widths, gap), strict=True)}
    for sweep in range(_SWEEPS):
        _pull(rows, middle, gap, downwards=sweep % 2 == 0)
    left = min(middle[name] - rows.widths[name] / 2 for name in middle)
    middle = {name: x - left for name, x in middle.items()}
    width = max(middle[name] + rows.widths[name] / 2 for name in middle)
    routes = {edge: tuple(middle[name] for name in chain) for edge, chain in rows.chains.items()}
    return Layout({name: (middle[name], ranks[name]) for name in sources}, routes, width, len(rows.rows))


def _ranks(sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Row of each node: one below its lowest source; a node without sources, one above its highest reader."""
    ranks: dict[str, int] = {}
    for name, read in sources.items():
        ranks[name] = max((ranks[source] + 1 for source in read), default=0)
    highest: dict[str, int] = {}
    for name, read in sources.items():
        for source in read:
            highest[source] = min(highest.get(source, ranks[name]), ranks[name])
    return {name: ranks[name] if read else max(highest.get(name, 1) - 1, 0) for name, read in sources.items()}


def _with_stand_ins(sources: Mapping[str, Sequence[str]], ranks: Mapping[str, int], widths: dict[str, float]) -> _Rows:
    rows = _Rows([[] for _ in range(max(ranks.values()) + 1)], widths)
    for name in sources:
        rows.rows[ranks[name]].append(name)
    for name, read in sources.items():
        for source in dict.fromkeys(read):
            chain = [source]
            for rank in range(ranks[source] + 1, ranks[name]):
                # One line per source and row serves all readers below.
                stand_in = f"{source}|{rank}"
                if stand_in not in widths:
                    widths[stand_in] = 2.0
                    rows.rows[rank].append(stand_in)
                    rows.join(chain[-1], stand_in)
                chain.append(stand_in)
            rows.join(chain[-1], name)
            rows.chains[source, name] = [*chain, name]
    return rows


def _order(rows: _Rows, downwards: bool) -> None:
    neighbours = rows.above if downwards else rows.below
    position = {name: index / max(len(row), 1) for row in rows.rows for index, name in enumerate(row)}
    for row in rows.rows if downwards else reversed(rows.rows):
        row.sort(key=lambda name: _mean([position[other] for other in neighbours.get(name, ())], position[name]))
        position |= {name: index / len(row) for index, name in enumerate(row)}


def _packed(row: Sequence[str], widths: Mapping[str, float], gap: float) -> list[float]:
    """Centres of adjacent boxes, with the row's centre at 0."""
    middles, x = [], 0.0
    for name in row:
        middles.append(x + widths[name] / 2)
        x += widths[name] + gap
    return [middle - (x - gap) / 2 for middle in middles]


def _pull(rows: _Rows, middle: dict[str, float], gap: float, downwards: bool) -> None:
    """Move every row towards its neighbours: the mean of resolving overlaps to the right and to the left."""
    neighbours = rows.above if downwards else rows.below
    for row in rows.rows if downwards else reversed(rows.rows):
        wish = [_mean([middle[other] for other in neighbours.get(name, ())], middle[name]) for name in row]
        halves = [rows.widths[name] / 2 for name in row]
        right = _pushed(wish, halves, gap)
        left = [-x for x in reversed(_pushed([-x for x in reversed(wish)], halves[::-1], gap))]
        for name, one, other in zip(row, right, left, strict=True):
            middle[name] = (one + other) / 2


def _pushed(wish: Sequence[float], halves: Sequence[float], gap: float) -> list[float]:
    found: list[float] = []
    for index, x in enumerate(wish):
        if index:
            x = max(x, found[-1] + halves[index - 1] + gap + halves[index])
        found.append(x)
    return found


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
