"""The tables of a sweep, as Markdown and as CSV; PREFACE explains the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from qpcompile.evaluate.report.groups import Group, ablation, factorial, full_precision
from qpcompile.evaluate.run.bootstrap import Interval, difference, retention
from qpcompile.evaluate.sweep.plan import BASE, SweepPlan

Line = dict[str, str | float]

PREFACE = """Accuracy and retention (accuracy over full precision's) in %, means over calibration seeds; `±` is the
standard deviation over seeds, brackets are 95 % intervals of a paired bootstrap over questions. Tokens are visual
tokens: mean over decoder layers and questions with a picture, and in the last layer. FLOPs: of the same prompt with
every token in every layer, tower and projector included, 4-bit products counted like others. Weights and KV cache of
one answer in bytes: codes and scales as stored, what stays in floating point as fp16."""

WORDS: Mapping[str, str] = {
    "quantizer": "quantizer",
    "pruner": "pruner",
    "share": "share",
    "variant": "variant",
    "numerics": "numerics",
    "seeds": "seeds",
    "accuracy": "accuracy",
    "retention": "retention",
    "against": "against",
    "mean_visual_tokens": "mean tokens",
    "final_visual_tokens": "last layer",
    "flops_share": "FLOPs %",
    "weight_bytes": "weights",
    "kv_bytes": "KV cache",
}


def lines(found: Sequence[Group], full: Group, against: Mapping[str, Group | None]) -> list[Line]:
    """One line per group; `against`: the comparison group, by the group's key text."""
    return [_line(group, full, against.get(text(group))) for group in found]


def text(group: Group) -> str:
    """A group's key as text."""
    return str(group.key)


def bed_tables(plan: SweepPlan, found: Sequence[Group], bed: str) -> dict[str, list[Line]]:
    """Title -> lines, for one bed: a table per quantizer, then the ablations."""
    full = full_precision(found, bed)
    tables = {}
    for quantizer in plan.quantizers:
        chosen = factorial(found, bed, quantizer)
        if chosen:
            tables[f"{bed}: {quantizer}"] = lines([full, *chosen], full, _references(plan, chosen))
    for name in plan.ablations:
        chosen = ablation(found, bed, name)
        if chosen:
            base = next((group for group in chosen if group.key.variant == BASE and group.rows), None)
            tables[f"{bed}: ablation {name}"] = lines([full, *chosen], full, {text(group): base for group in chosen})
    return tables


def markdown(title: str, table: Sequence[Line]) -> str:
    """One table."""
    heads = [head for head in WORDS if any(head in line for line in table)]
    rows = [" | ".join(_cell(head, line) for head in heads) for line in table]
    rule = " | ".join("---" for _ in heads)
    body = "\n".join(f"| {row} |" for row in [" | ".join(WORDS[head] for head in heads), rule, *rows])
    return f"## {title}\n\n{body}\n"


def agreement_table(title: str, shared: Sequence[Mapping[str, str | float]]) -> str:
    """The agreement of kept tokens between two quantizers."""
    rows = [f"| {line['pruner']} | {line['share']:g} | {line['agreement']:.3f} |" for line in shared]
    head = ["| pruner | share | intersection over union |", "| --- | --- | --- |"]
    return "\n".join([f"## {title}\n", *head, *rows, ""])


def csv_text(tables: Mapping[str, Sequence[Line]]) -> str:
    """All tables in one file, with the title as a column and intervals as columns of their own."""
    flat = [{"table": title, **line} for title, table in tables.items() for line in table]
    heads = list(dict.fromkeys(head for line in flat for head in line))
    target = io.StringIO()
    writer = csv.DictWriter(target, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return target.getvalue()


def _references(plan: SweepPlan, found: Sequence[Group]) -> dict[str, Group | None]:
    """The comparison group of each pruned group: the plan's reference at the same share."""
    opponents = {g.key.share: g for g in found if g.key.pruner == plan.reference and g.rows}
    return {text(group): opponents.get(group.key.share) for group in found}


def _line(group: Group, full: Group, opponent: Group | None) -> Line:
    key = group.key
    line: Line = {"quantizer": key.quantizer or "full precision", "pruner": key.pruner, "share": key.share}
    if key.variant is not None:
        line["variant"] = key.variant
    if not group.rows:
        return {**line, "accuracy": f"not possible: {group.error}"}
    if (recipe := group.rows[0].recipe) is not None and "numerics" in recipe:
        line["numerics"] = recipe["numerics"]
    line |= {"seeds": len(group.rows), "accuracy": 100 * group.accuracy, "accuracy_spread": 100 * group.spread}
    if full.accuracy and group is not full:
        line |= _interval("retention", retention(group.marks, full.marks))
    if opponent is not None and opponent is not group:
        line |= _interval("against", difference(group.marks, opponent.marks))
    fields = ("mean_visual_tokens", "final_visual_tokens", "weight_bytes", "kv_bytes")
    return {**line, **{field: group.mean(field) for field in fields}, "flops_share": 100 * group.mean("flops_share")}


def _interval(name: str, found: Interval) -> Line:
    return {name: 100 * found.estimate, f"{name}_low": 100 * found.low, f"{name}_high": 100 * found.high}


def _cell(head: str, line: Line) -> str:
    """One formatted cell."""
    value = line.get(head)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if head == "accuracy":
        return f"{value:.2f} ± {line['accuracy_spread']:.2f}"
    if head in ("retention", "against"):
        sign = "+" if head == "against" else ""
        return f"{value:{sign}.1f} [{line[f'{head}_low']:{sign}.1f}, {line[f'{head}_high']:{sign}.1f}]"
    if head in ("weight_bytes", "kv_bytes"):
        return f"{value:,.0f}"
    return f"{value:g}" if head in ("share", "seeds") else f"{value:.1f}"
