"""Rows of the CPU benchmark: medians of interleaved runs, ratios to a baseline of the same run, CSV and Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

BASELINE = "torch fp32"
# In a target instead of a peer's name: the best of other runtimes, with one thread and one prompt.
BEST_PEER = "best peer"
# In a target instead of a peer's name: a read of the bytes that a decode step must read, at the core's bandwidth.
READING = "a read of its bytes"
OURS = "ours"


@dataclass(frozen=True)
class Row:
    """The result of one peer on one shape. `runs` are its workers' answers; `note` says why there are none.

    `run` names the benchmark run: ratios are computed within one run only.
    """

    shape: str
    peer: str
    run: str
    loaded: Mapping[str, Any] = field(default_factory=dict)
    runs: Sequence[Mapping[str, float]] = ()
    note: str = ""

    def values(self, name: str) -> list[float]:
        """One measure in all runs, sorted."""
        return sorted(each[name] for each in self.runs if name in each)

    def middle(self, name: str) -> float | None:
        """The median of a measure over the runs."""
        found = self.values(name)
        return median(found) if found else None

    @property
    def peak_mb(self) -> float | None:
        """Peak resident memory since the process began, loading included."""
        return max(self.values("peak_mb"), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """`measure` of `peer` over that of `other` (or BEST_PEER, READING) on `shape` should be at most `most`."""

    shape: str
    measure: str
    peer: str
    other: str
    most: float


COLUMNS = (
    "shape", "peer", "run", "runs", "first_core_ms", "first_core_low", "first_core_high", "first_wall_ms",
    "decode_core_ms", "decode_core_low", "decode_core_high", "decode_wall_ms", "first_ratio", "decode_ratio",
    "tokens_per_s", "step_mb", "read_gbps", "read_share", "peak_mb", "weights_mb", "kv_mb", "load_s", "note",
)  # fmt: skip


def clock(row: Row) -> str:
    """CPU time, which other processes do not increase; with several threads, which share it, wall-clock time."""
    return "core" if row.loaded.get("threads", 1) == 1 else "wall"


def measure(row: Row, name: str) -> float | None:
    """A row's number: first_ms and decode_ms by its clock, what follows from them, or a field of its runs."""
    decode = row.middle(f"decode_{clock(row)}_ms")
    if name in ("first_ms", "decode_ms"):
        return row.middle(name.replace("_ms", f"_{clock(row)}_ms"))
    if name == "peak_mb":
        return row.peak_mb
    if name == "tokens_per_s":
        return None if decode is None else 1e3 * row.loaded.get("batch", 1) / decode
    if name == "read_ms":
        return reading(row)
    if name == "read_share":
        floor = reading(row)
        return None if decode is None or floor is None else floor / decode
    return row.loaded.get(name, row.middle(name))


def reading(row: Row) -> float | None:
    """Milliseconds to read what a decode step must: its weights, and the cache if the peer tells its size."""
    if "step_mb" not in row.loaded or "read_gbps" not in row.loaded:
        return None
    return (row.loaded["step_mb"] + (row.middle("kv_mb") or 0)) / row.loaded["read_gbps"]


def ratio(rows: Iterable[Row], row: Row, name: str, other: str = BASELINE) -> float | None:
    """The row's number over that of the peer `other` on the same shape in the same run."""
    own = measure(row, name)
    if other == READING:
        found = [reading(row)]
    else:
        same = [each for each in rows if (each.shape, each.run) == (row.shape, row.run)]
        found = [measure(each, name) for each in same if each.peer == other or (other == BEST_PEER and is_peer(each))]
    theirs = min((each for each in found if each), default=None)
    return own / theirs if own is not None and theirs else None


def is_peer(row: Row) -> bool:
    """Another runtime with one thread and one prompt."""
    alone = row.loaded.get("threads", 1) == row.loaded.get("batch", 1) == 1
    return alone and not row.peer.startswith(OURS)


def as_csv(rows: Sequence[Row]) -> str:
    """All rows; ratios are this row's time over the baseline's."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells: dict[str, Any] = {"shape": row.shape, "peer": row.peer, "run": row.run, "runs": len(row.runs)}
        for kind in ("first", "decode"):
            seconds = row.values(f"{kind}_core_ms")
            if seconds:
                cells[f"{kind}_core_ms"] = _text(median(seconds))
                cells[f"{kind}_core_low"], cells[f"{kind}_core_high"] = _text(seconds[0]), _text(seconds[-1])
            cells[f"{kind}_wall_ms"] = _text(row.middle(f"{kind}_wall_ms"))
            cells[f"{kind}_ratio"] = _text(ratio(rows, row, f"{kind}_ms"), 3)
        for name in ("tokens_per_s", "step_mb", "read_gbps", "peak_mb", "weights_mb", "kv_mb", "load_s"):
            cells[name] = _text(measure(row, name))
        cells["read_share"] = _text(measure(row, "read_share"), 3)
        writer.writerow({**cells, "note": row.note})
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """One table for each shape: a line per peer."""
    parts = []
    for shape in dict.fromkeys(row.shape for row in rows):
        lines = [
            "| peer | first token ms | of the baseline | decode ms/step | of the baseline | share of the bandwidth "
            "| peak MB | weights MB | KV MB |",
            "| --- " * 9 + "|",
        ]
        notes = []
        for row in [each for each in rows if each.shape == shape]:
            if not row.runs:
                notes.append(f"- {row.peer}: {row.note or 'not run'}")
                continue
            cells = [row.peer]
            for kind in ("first", "decode"):
                cells += [_spread(row, f"{kind}_{clock(row)}_ms"), _text(ratio(rows, row, f"{kind}_ms"), 2)]
            cells.append(_text(measure(row, "read_share"), 2))
            cells += [_text(measure(row, name), digits) for name, digits in MEMORY]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join([f"## {shape}", "", *lines, *([""] if notes else []), *notes]) + "\n")
    return "\n".join(parts)


MEMORY = (("peak_mb", 0), ("weights_mb", 0), ("kv_mb", 1))


def targets_as_markdown(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """Each target with the result; `not run` if its two rows are not of one run."""
    lines = ["| shape | measure | ours | against | ratio | target | met |", "| --- " * 7 + "|"]
    for target in targets:
        own = [row for row in rows if (row.shape, row.peer) == (target.shape, target.peer)]
        found = ratio(rows, own[0], target.measure, target.other) if own else None
        shown, met = ("not run", "") if found is None else (f"{found:.2f}", "yes" if found <= target.most else "no")
        cells = (target.shape, target.measure, target.peer, target.other, shown, f"{target.most}", met)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def busyness(rows: Iterable[Row]) -> float | None:
    """Wall-clock time over CPU time: 1 on an otherwise idle machine."""
    found = [each["first_wall_ms"] / each["first_core_ms"] for row in rows for each in row.runs]
    return median(found) if found else None


def _spread(row: Row, name: str) -> str:
    values = row.values(name)
    if not values:
        return ""
    digits = 0 if median(values) >= 100 else 1
    return f"{median(values):,.{digits}f} ({values[0]:,.{digits}f}..{values[-1]:,.{digits}f})"


def _text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
