"""The table of a kernel benchmark: rates, their share of the measured ceilings, ratios, CSV and Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemm_layers import Layer
from gpu_timing import Times


@dataclass(frozen=True)
class Ceiling:
    """Measured ceilings of this GPU: operations per second by type of product, and bytes per second copied."""

    operations: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Row:
    """One kernel on one layer and token count. `times` is None if it did not run, and `note` says why.

    `kind` is the type of product ("int8", "fp8", "bf16"), `size` the bytes that must be read and written.
    """

    layer: Layer
    tokens: int
    kernel: str
    kind: str
    size: int
    times: Times | None
    note: str = ""

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.layer.out_features * self.layer.in_features


def floor(row: Row, ceiling: Ceiling) -> float:
    """Seconds that the operations or the bytes take at the measured ceilings, whichever is longer."""
    return max(row.operations / ceiling.operations[row.kind], row.size / ceiling.bandwidth)


COLUMNS = (
    "model", "layer", "out_features", "in_features", "tokens", "kernel", "microseconds", "low", "high", "tops",
    "gb_per_s", "share_of_ceiling", "times_bf16", "note",
)  # fmt: skip


def as_csv(rows: Sequence[Row], ceiling: Ceiling, baseline: str) -> str:
    """All rows; `times_bf16` is the time of `baseline` on the same layer and tokens over the row's own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_cells(row, ceiling, _seconds(rows, row, baseline)) for row in rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], baseline: str) -> str:
    """One table per layer: a line per kernel, a column per token count, microseconds and the ratio to `baseline`."""
    parts = []
    for layer in dict.fromkeys(row.layer for row in rows):
        own = [row for row in rows if row.layer == layer]
        tokens = list(dict.fromkeys(row.tokens for row in own))
        lines = [
            f"### {layer.model} {layer.name}: {layer.out_features} x {layer.in_features}",
            "",
            f"| us (times {baseline}) | " + " | ".join(f"{count:,}" for count in tokens) + " |",
            "| --- " * (len(tokens) + 1) + "|",
        ]
        for kernel in dict.fromkeys(row.kernel for row in own):
            found = {row.tokens: row for row in own if row.kernel == kernel}
            cells = [_short(found.get(count), own, baseline) for count in tokens]
            lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _seconds(rows: Sequence[Row], like: Row, kernel: str) -> float | None:
    """The time of `kernel` on the layer and tokens of `like`."""
    for row in rows:
        if (row.layer, row.tokens, row.kernel) == (like.layer, like.tokens, kernel) and row.times is not None:
            return row.times.median
    return None


def _cells(row: Row, ceiling: Ceiling, baseline: float | None) -> list[str | int]:
    layer, times = row.layer, row.times
    head = [layer.model, layer.name, layer.out_features, layer.in_features, row.tokens, row.kernel]
    if times is None:
        return [*head, *[""] * 7, row.note]
    measured = [f"{each * 1e6:.2f}" for each in (times.median, times.low, times.high)]
    rates = [f"{row.operations / times.median / 1e12:.2f}", f"{row.size / times.median / 1e9:.0f}"]
    ratio = "" if baseline is None else f"{baseline / times.median:.2f}"
    return [*head, *measured, *rates, f"{floor(row, ceiling) / times.median:.2f}", ratio, row.note]


def _short(row: Row | None, rows: Sequence[Row], baseline: str) -> str:
    if row is None or row.times is None:
        return "-"
    seconds = _seconds(rows, row, baseline)
    ratio = "" if seconds is None else f" ({seconds / row.times.median:.2f})"
    return f"{row.times.median * 1e6:.1f}{ratio}"
