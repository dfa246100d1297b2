"""How the cost of an answer grows: python tests/bench/cpu_growth.py [--axes visual layers batch answer]

A small Qwen2-VL (tower 256 x 4, decoder 512 x 8), whose pictures may have any size, as transformers runs it and
compiled, on one core. One value changes at a time. Writes a CSV and a plot per axis to docs/results/.
"""

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cpu import ANSWER_LIMIT, PeerError, load, prepare, say, tell
from cpu_peers import BUILD, MAKES, PEERS, ROOT
from cpu_shapes import SHAPES

ROWS = ("torch bf16", "ours w4a4kv4, bf16", "ours quota-30, bf16")
BASE = {"side": 672, "layers": 8, "batch": 1, "new_tokens": 32}
# Heights of square pictures that give 144, 576, 1,024, 2,304 and 4,096 visual tokens.
SIDES = (336, 672, 896, 1344, 1792)
AXES: Mapping[str, tuple[str, Sequence[int]]] = {
    "visual": ("side", SIDES),
    "layers": ("layers", (4, 8, 16, 24)),
    "batch": ("batch", (1, 2, 4, 8)),
    "answer": ("new_tokens", (8, 32, 128, 512)),
}
MEASURES = ("first_core_ms", "decode_core_ms", "answer_core_ms", "peak_mb", "kv_mb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--stale", action="store_true", help="take what was made before the code changed")
    parser.add_argument("--build", type=Path, default=BUILD)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for axis in options.axes:
        found = measure(axis, options)
        write(found, options.out / f"growth-{axis}.csv")
        plot(axis, found, options.out / f"growth-{axis}.svg")
    return 0


def measure(axis: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per peer and value: the minimum over rounds, each in a separate process so that its peak is its own."""
    key, values = AXES[axis]
    rows = []
    for value in values:
        asked = {**BASE, key: value}
        shape = f"growth-{asked['layers']}"
        for name in ROWS:
            peer = PEERS[name]
            try:
                prepare(MAKES[peer.folder], shape, options.build / shape, options.stale, {})
                worker = load(peer, shape, options.build / shape, [options.core], asked["new_tokens"])
                question = {"side": asked["side"], "batch": asked["batch"]}
                try:
                    runs = [
                        tell(worker, {"prompt": number, **question}, ANSWER_LIMIT)
                        for number in range(options.rounds + 1)
                    ][1:]
                finally:
                    worker.close()
            except PeerError as error:
                say(f"{axis} {value}: {name}: {error}")
                continue
            rows.append({"axis": axis, "value": shown(axis, value), "peer": name, **best(runs)})
            say(f"{axis} {value}: {name}: {rows[-1]['first_core_ms']:.0f} ms, peak {rows[-1]['peak_mb']:.0f} MB")
    return rows


def best(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The minimum time and the maximum peak."""
    found = {name: min(run[name] for run in runs) for name in ("first_core_ms", "decode_core_ms", "kv_mb")}
    whole = min(run["first_core_ms"] + run["decode_core_ms"] * (run["tokens"] - 1) for run in runs)
    return {**found, "answer_core_ms": whole, "peak_mb": max(run["peak_mb"] for run in runs)}


def shown(axis: str, value: int) -> int:
    """The value as shown in the plot: visual tokens instead of a height."""
    return SHAPES["growth-8"].changed(side=value).visual_tokens if axis == "visual" else value


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One CSV per axis."""
    with path.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("axis", "value", "peer", *MEASURES))
        for row in rows:
            head = [row["axis"], row["value"], row["peer"]]
            writer.writerow([*head, *(f"{row[name]:.2f}" for name in MEASURES)])


def plot(axis: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time and memory against the axis, one line per peer; both axes logarithmic."""
    mpl.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    mpl.rcParams["svg.hashsalt"] = "growth"
    panels = (
        ("answer_core_ms", "whole answer, ms") if axis == "answer" else ("first_core_ms", "first token, ms"),
        ("decode_core_ms", "decode, ms/token"),
        ("peak_mb", "peak memory, MB"),
        ("kv_mb", "KV cache, MB"),
    )
    figure, places = pyplot.subplots(1, len(panels), figsize=(14, 3.4))
    for place, (name, title) in zip(places, panels, strict=True):
        for peer in ROWS:
            points = [(row["value"], row[name]) for row in rows if row["peer"] == peer]
            if points:
                place.plot(*zip(*points, strict=True), marker="o", label=peer)
        place.set(xscale="log", yscale="log", xlabel=LABELS[axis], title=title)
        values = sorted({row["value"] for row in rows})
        place.set_xticks(values, labels=[f"{value:,}" for value in values])
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        for line in (place.xaxis, place.yaxis):
            line.set_minor_formatter(NullFormatter())
        place.grid(alpha=0.3)
    places[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


LABELS = {"visual": "visual tokens", "layers": "decoder layers", "batch": "batch", "answer": "new tokens"}


if __name__ == "__main__":
    sys.exit(main())
