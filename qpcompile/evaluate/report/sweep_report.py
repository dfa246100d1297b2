"""The report of a sweep: tables (Markdown, CSV) and figures (PNG, SVG), regenerated from the rows each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.report import question_groups, tables
from qpcompile.evaluate.report.figures import ablation_figure, figure_bytes, profile_figure, profiles, retention_figure
from qpcompile.evaluate.report.groups import Group, groups
from qpcompile.evaluate.report.kept_figure import PICTURES, agreements, kept_figure
from qpcompile.evaluate.sweep.plan import Bed, SweepPlan
from qpcompile.evaluate.sweep.sweep import CellResult
from qpcompile.files import replace_file


def write_sweep(plan: SweepPlan, results: Sequence[CellResult], out: Path, command: str) -> None:
    """Write tables.md, tables.csv and figures/ into `out`; `command` is the command line to record."""
    found = groups(results)
    parts = [f"# Sweep\n\nMade by `{command}`.\n\n{tables.PREFACE}\n"]
    every: dict[str, list[tables.Line]] = {}
    for bed in plan.beds:
        made = tables.bed_tables(plan, found, bed.name)
        every |= made
        parts += [tables.markdown(title, table) for title, table in made.items()]
        by_group = question_groups.group_table(
            f"{bed.name}: accuracy in % by group of questions", [group for group in found if group.key.bed == bed.name]
        )
        parts += [by_group] if by_group else []
        shared = agreements(found, bed.name, list(plan.quantizers))
        if len(plan.quantizers) > 1 and shared:
            first, *_, last = plan.quantizers
            parts.append(tables.agreement_table(f"{bed.name}: tokens kept alike with {first} and {last}", shared))
        for name, figure in bed_figures(plan, found, bed).items():
            for kind in ("png", "svg"):
                replace_file(out / "figures" / f"{bed.name}-{name}.{kind}", figure_bytes(figure, kind))
            parts.append(f"![{bed.name}: {name}](figures/{bed.name}-{name}.png)\n")
    replace_file(out / "tables.md", "\n".join(parts).encode())
    replace_file(out / "tables.csv", tables.csv_text(every).encode())


def bed_figures(plan: SweepPlan, found: Sequence[Group], bed: Bed) -> dict[str, Figure]:
    """File name -> figure, for one bed; omitted where rows are missing."""
    figures = {f"retention-{name}": retention_figure(found, bed.name, name) for name in plan.quantizers}
    figures |= {f"ablation-{name}": ablation_figure(found, bed.name, name) for name in plan.ablations}
    figures["profile"] = profile_figure(bed.name, profiles(found, bed.name))
    pruner = plan.reference or next(iter(plan.pruners))
    questions = [each for each in read_data(Path(bed.data)) if each.image is not None][:PICTURES]
    for share in plan.shares:
        drawn = kept_figure(found, bed.name, list(plan.quantizers), pruner, share, questions)
        figures[f"kept-{100 * share:g}"] = drawn
    return {name.replace(" ", "-"): figure for name, figure in figures.items() if figure is not None}
