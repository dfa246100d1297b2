"""Rows of the report's tables, from the plan and the pass records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpcompile.ir.pass_manager import PassRun
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import KEPT, LeftOut, Plan, Site
from qpcompile.recipe.quantize import CacheScheme

NUMERICS = {
    "exact": "exact: sums in float64, rounded to float32 once",
    "fast": "fast: sums in float32",
}
"""Each value of `numerics` in words."""
_NUMBERED = re.compile(r"^(?P<stem>.*?)\.(?P<layer>\d+)\.(?P<part>.+)$")


@dataclass(frozen=True)
class GraphChange:
    """Operators of one graph before and after a pass; `changes` are (operator, difference), largest loss first."""

    graph: str
    before: int
    after: int
    changes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class PassRow:
    """One pass: its purpose, whether it changed anything (None: unknown), and the changes per graph."""

    name: str
    purpose: str
    modified: bool | None
    graphs: tuple[GraphChange, ...]


@dataclass(frozen=True)
class SiteRow:
    """One quantized site; identical sites of several graphs share a row."""

    site: Site
    graphs: str
    stem: str
    layer: int | None
    part: str


@dataclass(frozen=True)
class LeftOutRow:
    """One site that was left unquantized."""

    name: str
    graphs: str
    reason: str


@dataclass(frozen=True)
class KernelRow:
    """One kernel and the number of sites that it computes."""

    kernel: str
    sites: int
    graphs: str


@dataclass(frozen=True)
class ErrorTable:
    """Errors of the numbered layers of one stack: a row per layer, a column per linear."""

    stem: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[float | None, ...]], ...]


def pass_rows(steps: Sequence[PassRun] | None, history: Iterable[str]) -> list[PassRow]:
    """One row per pass; from `history` alone, without counts, if the steps are unknown."""
    purposes = pass_purposes()
    if steps is None:
        return [PassRow(name, purposes.get(name, ""), None, ()) for name in history]
    return [PassRow(step.name, purposes.get(step.name, ""), step.modified, _graph_changes(step)) for step in steps]


def pass_purposes() -> dict[str, str]:
    """What each pass is for, by its name."""
    return {item.name: item.purpose for item in passes((), 0)}


def site_rows(sites: Iterable[Site]) -> list[SiteRow]:
    """Rows by stack, layer and part."""
    groups: dict[Site, list[str]] = {}
    for site in sites:
        groups.setdefault(site.model_copy(update={"graph": "any"}), []).append(site.graph)
    rows = [SiteRow(site, ", ".join(graphs), *_split(site.name)) for site, graphs in groups.items()]
    return sorted(rows, key=lambda row: (row.stem, -1 if row.layer is None else row.layer, row.part))


def kernel_rows(sites: Iterable[Site]) -> list[KernelRow]:
    """One row per kernel, the most used first; a site that several graphs share counts once."""
    names: dict[str, set[str]] = {}
    graphs: dict[str, dict[str, None]] = {}
    for site in sites:
        names.setdefault(site.kernel, set()).add(site.name)
        graphs.setdefault(site.kernel, {})[site.graph] = None
    rows = [KernelRow(kernel, len(found), ", ".join(graphs[kernel])) for kernel, found in names.items()]
    return sorted(rows, key=lambda row: (-row.sites, row.kernel))


def left_out_rows(places: Iterable[LeftOut]) -> list[LeftOutRow]:
    """Rows by name; graphs that leave out the same site for the same reason share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for place in places:
        groups.setdefault((place.name, place.reason), []).append(place.graph)
    return [LeftOutRow(name, ", ".join(graphs), reason) for (name, reason), graphs in sorted(groups.items())]


def error_tables(rows: Sequence[SiteRow]) -> list[ErrorTable]:
    """One table per stack of numbered layers with a known error."""
    tables = []
    for stem in dict.fromkeys(row.stem for row in rows if row.layer is not None):
        known = [row for row in rows if row.stem == stem and row.layer is not None and row.site.error is not None]
        columns = tuple(dict.fromkeys(row.part for row in known))
        cells = {(row.layer, row.part): row.site.error for row in known}
        layers = sorted({row.layer for row in known if row.layer is not None})
        if layers:
            lines = tuple((layer, tuple(cells.get((layer, column)) for column in columns)) for layer in layers)
            tables.append(ErrorTable(stem, columns, lines))
    return tables


def settings(plan: Plan) -> list[tuple[str, str]]:
    """The recipe's settings, in words."""
    scheme, tokens = plan.recipe.quantize, plan.recipe.tokens
    rows = []
    if scheme is None:
        rows.append(("quantization", "none"))
    else:
        per = {"group": f"group of {scheme.weights.group_size}"}
        weights = _bits(scheme.weights.bits, per.get(scheme.weights.granularity, scheme.weights.granularity))
        rows += [
            ("weights", weights if scheme.weights.bits == 16 else f"{weights}, {scheme.weights.solver}"),
            *_codes(plan),
            ("activations", _bits(scheme.activations.bits, scheme.activations.granularity)),
            *(
                (f"bits of {part}", f"8 for some sites, a mean of {mean:g} at most")
                for part, mean in (("weights", scheme.mean_bits.weights), ("activations", scheme.mean_bits.activations))
                if mean is not None
            ),
            ("KV cache", _of_cache(scheme.kv_cache)),
            ("transform", scheme.transform + (f", smoothing {scheme.smooth:g}" if scheme.smooth is not None else "")),
            ("scope", ", ".join(scheme.scope)),
            ("ignore", ", ".join(scheme.ignore) or "nothing"),
        ]
    kept = "all visual tokens are kept" if tokens.method == "none" else f"{tokens.method}, keep {tokens.keep:.0%}"
    rows.append(("visual tokens", kept))
    rows.append(("numerics", NUMERICS[plan.recipe.numerics]))
    used = plan.calibration
    rows.append(("calibration", f"{used.samples} samples" if used.samples else "no data"))
    return rows


def _codes(plan: Plan) -> list[tuple[str, str]]:
    """How many linears keep the codes of a quantized checkpoint; nothing for a model from full precision."""
    said = {site.name: site.codes for site in plan.sites if site.codes is not None}
    kept = sum(codes == KEPT for codes in said.values())
    return [("codes of the checkpoint", f"kept by {kept} of {len(said)} linears")] if said else []


def _of_cache(cache: CacheScheme) -> str:
    return _bits(cache.bits, "") if cache.bits == 16 else f"{cache.words} per token and head"


def _bits(bits: int, granularity: str) -> str:
    return "left as they are" if bits == 16 else f"{bits} bits per {granularity}"


def _graph_changes(step: PassRun) -> tuple[GraphChange, ...]:
    found = []
    for graph in dict.fromkeys([*step.before, *step.after]):
        before, after = step.before.get(graph, {}), step.after.get(graph, {})
        deltas = {name: after.get(name, 0) - before.get(name, 0) for name in {*before, *after}}
        changes = tuple(sorted(((n, d) for n, d in deltas.items() if d), key=lambda item: (item[1], item[0])))
        if changes:
            found.append(GraphChange(graph, sum(before.values()), sum(after.values()), changes))
    return tuple(found)


def _split(name: str) -> tuple[str, int | None, str]:
    """(stack, layer, part) of a dotted module name; a name without a number is its own stack."""
    match = _NUMBERED.match(name)
    return (match["stem"], int(match["layer"]), match["part"]) if match else (name, None, "")
