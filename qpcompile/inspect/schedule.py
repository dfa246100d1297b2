"""Plots over the decoder's layers as SVG text: visual tokens, sensitivity, attention mass, redundancy.

Colours are CSS variables of the page (`--ink`, `--accent`, ...), so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qpcompile.recipe.plan import Plan

# Placeholder colours that matplotlib can parse, each replaced by a CSS variable.
INK, MUTED, GRID, ACCENT, SECOND, SHADE = (f"#{digit}{digit}{digit}7{digit}7" for digit in "123456")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", SHADE: "shade"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
_INCHES = 8.6
# Beyond this many layers not every tick of the axis is labelled.
_MOST_TICKS = 40


def schedule_svg(plan: Plan, visual: int) -> str:
    """Visual tokens that each layer processes, when `visual` tokens enter the decoder; SVG text."""
    counts = plan.visual_tokens(visual)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "schedule"}):
        figure = Figure(figsize=(_INCHES, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _layer_axis(axes, plan)
        axes.bar(range(len(counts)), counts, width=0.72, color=ACCENT)
        axes.set_ylim(0, visual * 1.14)
        axes.set_ylabel("visual tokens")
        axes.set_xlabel("decoder layer")
        if len(counts) <= _MOST_TICKS:
            for layer, count in enumerate(counts):
                axes.annotate(str(count), (layer, count), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
        mean = sum(counts) / len(counts)
        axes.axhline(mean, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {mean:.1f}", (1, mean), (-2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color=SECOND, fontsize=9,
        )  # fmt: skip
        return _svg(figure)


def profile_svg(plan: Plan) -> str:
    """Calibration measurements per layer, candidate layers shaded and cuts dashed; "" if there are none."""
    panels = [
        draw for draw, there in ((_sensitivity, plan.sensitivity), (_mass, plan.facts), (_cosine, plan.facts)) if there
    ]
    if not panels:
        return ""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "profile"}):
        figure = Figure(figsize=(_INCHES, 0.5 + 1.85 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, draw in zip(rows, panels, strict=True):
            _layer_axis(axes, plan)
            for layer in plan.candidate_layers:
                axes.axvspan(layer - 0.5, layer + 0.5, color=SHADE, linewidth=0, zorder=0)
            for cut in plan.cuts:
                axes.axvline(cut.layer + 0.5, color=SECOND, linewidth=1.1, linestyle=(0, (3, 2)))
            draw(axes, plan)
        rows[-1].set_xlabel("decoder layer (shaded: candidates; dashed: tokens are dropped here)")
        return _svg(figure)


def _sensitivity(axes: Axes, plan: Plan) -> None:
    axes.set_title("sensitivity: relative change of the layer's output by quantization")
    layers = [entry.layer for entry in plan.sensitivity]
    axes.bar(layers, [entry.raw for entry in plan.sensitivity], width=0.6, color=ACCENT)
    for entry in plan.sensitivity:
        axes.annotate(
            f"{entry.normalized:.2f}", (entry.layer, entry.raw), (0, 2),
            textcoords="offset points", ha="center", fontsize=8.5, color=MUTED,
        )  # fmt: skip
    axes.set_ylim(0, max(max(entry.raw for entry in plan.sensitivity) * 1.25, 1e-9))


def _mass(axes: Axes, plan: Plan) -> None:
    axes.set_title("attention concentration: mass on the ten most attended visual tokens (band: interquartile range)")
    layers = [facts.layer for facts in plan.facts]
    middle = [facts.mass_median for facts in plan.facts]
    low = [facts.mass_median - facts.mass_iqr / 2 for facts in plan.facts]
    high = [facts.mass_median + facts.mass_iqr / 2 for facts in plan.facts]
    axes.fill_between(layers, low, high, color=ACCENT, alpha=0.22, linewidth=0)
    axes.plot(layers, middle, color=ACCENT, marker="o", markersize=4, linewidth=1.6)
    axes.set_ylim(bottom=min(0.0, *low))


def _cosine(axes: Axes, plan: Plan) -> None:
    axes.set_title("redundancy: median cosine between visual tokens")
    layers = [facts.layer for facts in plan.facts]
    axes.plot(layers, [facts.cosine for facts in plan.facts], color=ACCENT, marker="o", markersize=4, linewidth=1.6)


def _layer_axis(axes: Axes, plan: Plan) -> None:
    count = len(plan.layers)
    step = -(-count // _MOST_TICKS)
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.6, count - 0.4)
    axes.grid(axis="y")
    axes.tick_params(length=0)


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for a page: no XML declaration, no URL, responsive size."""
    target = io.StringIO()
    FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"<svg\b[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg class="plot" role="img" \1>', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text
