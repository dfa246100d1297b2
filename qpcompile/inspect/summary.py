"""A compiled model in a few lines: what Python prints, and what a notebook shows."""

from __future__ import annotations

from html import escape

from qpcompile.inspect.tables import settings
from qpcompile.ir.program import Program
from qpcompile.quality.verdict import verdict

_STYLE = "text-align: left; vertical-align: top"


def summary(program: Program, weight_bytes: int) -> list[tuple[str, str]]:
    """(what, value) by line: the model, its size, the recipe's settings, the cuts, the agreement measured."""
    host, plan = program.host, program.plan
    rows = [
        ("model", f"{type(host).__name__}, {len(program.layers)} decoder layers"),
        ("type and device", f"{str(host.dtype).removeprefix('torch.')} on {host.device}"),  # type: ignore[union-attr]
        ("all weights", f"{weight_bytes / 1e6:,.1f} MB"),
        *settings(plan),
    ]
    if plan.cuts:
        rows.append(("visual tokens kept", ", ".join(f"{cut.ratio:.1%} {cut.place}" for cut in plan.cuts)))
    agreement = "not measured" if plan.quality is None else verdict(plan.quality)
    return [*rows, ("agreement with full precision", agreement)]


def as_text(rows: list[tuple[str, str]]) -> str:
    """The lines, aligned, for a terminal."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(["CompiledVLM", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def as_html(rows: list[tuple[str, str]]) -> str:
    """The lines as a table, for a notebook."""
    cells = "".join(
        f'<tr><th scope="row" style="{_STYLE}">{escape(name)}</th><td style="{_STYLE}">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>CompiledVLM</caption>{cells}</table>"
