"""The report of a compiled model: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qpcompile.claims import claimed
from qpcompile.emit.artifact.weights import stored_tensors
from qpcompile.files import write_new_file
from qpcompile.inspect.graph_svg import layer_svg
from qpcompile.inspect.layer_nodes import layer_names, layer_nodes, layer_text
from qpcompile.inspect.overlay import ANSWER_TOKENS, Overlay, Sample, overlays
from qpcompile.inspect.schedule import profile_svg, schedule_svg
from qpcompile.inspect.side_by_side import SHOWN, Row, SideBySide
from qpcompile.inspect.tables import error_tables, kernel_rows, left_out_rows, pass_rows, settings, site_rows
from qpcompile.ir.names import CROSS_KEPT, STATE
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.pass_manager import PASS_RUNS
from qpcompile.ir.program import PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.quality.choice_table import how_chosen, price_rows
from qpcompile.quality.verdict import grade, increments, verdict
from qpcompile.recipe.bits_told import told_bits
from qpcompile.recipe.plan import Plan
from qpcompile.runtime.machine import Machine
from qpcompile.versions import package_versions

# The schedule is drawn for this many visual tokens if neither a sample nor the model determines the number.
_UNKNOWN_VISUAL = 100
_PACKED, _SCALE = "_packed", "_scale"


def write_report(
    machine: Machine,
    processor: Any,
    path: str | PathLike[str],
    samples: Iterable[Sample] | None = None,
    decode_problem: str = "",
    measure: Callable[[], SideBySide] | None = None,
) -> None:
    """Write the report as a new HTML file. It begins with the verdict; how the compile went is last.

    Args:
        machine: the compiled program; for a loaded one passes are listed without operator counts.
        processor: the processor for samples.
        path: the file; an existing one is refused.
        samples: (picture, question) pairs, on which kept tokens are drawn. A picture is a path or a PIL image.
        decode_problem: why decode steps run node by node here; empty if one C call replays them.
        measure: asks the model questions, and the original too; None: accuracy, time and memory are not on the page.

    Raises OutputError for a path that cannot be written, CalibrationError for samples that the model does not accept.
    """
    with claimed(path, "file") as claim:
        drawn = None if samples is None else overlays(machine, processor, samples)
        measured = None if measure is None else measure()
        write_new_file(claim, report_html(machine, drawn, decode_problem, measured).encode())


def report_html(
    machine: Machine, drawn: list[Overlay] | None, decode_problem: str, measured: SideBySide | None = None
) -> str:
    """The page's text; `drawn` holds the samples with their kept tokens."""
    program, config = machine.program, machine.host.config
    plan = program.plan
    steps = program.measured.get(PASS_RUNS)
    sites = site_rows(plan.sites)
    errors = [row.site.error for row in sites if row.site.error is not None]
    visual, known = _visual_tokens(config, drawn)
    environment = Environment(
        loader=PackageLoader("qpcompile", "inspect"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        version=package_versions()["qpcompile"],
        model=_model(machine),
        tiles=[*_told_first(plan, measured), *_tiles(program, visual, len(sites))],
        measured=measured,
        answers=_answers(plan, measured)[:SHOWN],
        costs=_costs(measured) if measured else [],
        answer_tokens=ANSWER_TOKENS,
        kernels=kernel_rows(plan.sites),
        decode_steps=_decode_steps(decode_problem),
        settings=settings(plan),
        recipe=plan.recipe.to_yaml(),
        quality=plan.quality,
        quality_tokens=plan.recipe.quality.tokens,
        grade=grade(plan.quality) if plan.quality else "",
        verdict=verdict(plan.quality) if plan.quality else "",
        lost=increments(plan.quality) if plan.quality else [],
        counted=steps is not None,
        passes=pass_rows(steps, program.history),
        schedule={"svg": schedule_svg(plan, visual), "note": _schedule_note(plan, visual, known), "visual": visual},
        cuts=plan.cuts,
        waived=plan.waived,
        choice=plan.choice,
        chosen=how_chosen(plan.choice) if plan.choice else "",
        prices=price_rows(plan.choice) if plan.choice else [],
        profile=profile_svg(plan),
        sensitivity=plan.sensitivity,
        layers=len(plan.layers),
        calibration=plan.calibration,
        sites=sites,
        bits_told=told_bits(plan),
        assigned=sorted(plan.bits, key=lambda entry: (entry.cost_raised - entry.cost) / entry.size),
        worst=max(errors, default=0.0) or 1.0,
        error_tables=error_tables(sites),
        left_out=left_out_rows(plan.left_out),
        near_misses=program.measured.get(NEAR_MISSES),
        overlays=drawn,
        graphs=_graphs(program),
        versions=list(plan.versions.items()),
        bits=lambda bits: "" if bits is None else str(bits),
    )


def _model(machine: Machine) -> dict[str, Any]:
    program, config = machine.program, machine.host.config
    text = config.get_text_config()
    facts = [
        ("family", config.model_type),
        ("decoder layers", len(program.plan.layers)),
        ("hidden width", getattr(text, "hidden_size", "")),
        ("attention heads", _heads(text)),
        ("vocabulary", getattr(text, "vocab_size", "")),
        ("floating point", str(machine.host.dtype).removeprefix("torch.")),
        ("graphs", ", ".join(program.graphs)),
        ("stage", program.stage),
    ]
    folder = Path(getattr(config, "_name_or_path", "") or "").name
    return {
        "name": type(program.host).__name__,
        "folder": folder,
        "facts": [row for row in facts if row[1] != ""],
    }


def _decode_steps(problem: str) -> str:
    return f"node by node: {problem}" if problem else "replayed by one C call"


def _heads(text: Any) -> str:
    queries, keys = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if queries is None:
        return ""
    return str(queries) if keys in (None, queries) else f"{queries}, {keys} for keys and values"


def _told_first(plan: Plan, measured: SideBySide | None) -> list[dict[str, str]]:
    """Agreement, accuracy and time: what is asked first."""
    tiles = []
    if plan.quality:
        same = f"{plan.quality.equal_answers} of {plan.quality.samples}"
        tiles.append({"value": same, "label": "answers as in full precision, when it was compiled"})
    if measured:
        ours, theirs, count = measured.compiled, measured.original, len(measured.questions)
        before = f", {theirs.right / count:.1%} by the original" if theirs else ""
        tiles.append({"value": f"{ours.right / count:.1%}", "label": f"right answers to {count} questions{before}"})
        if theirs:
            first, later = (
                f"{each:.2f} x" for each in (ours.first_ms / theirs.first_ms, ours.token_ms / theirs.token_ms)
            )
            tiles.append({"value": first, "label": "the original's time to the first token"})
            tiles.append({"value": later, "label": "its time per later token"})
    return tiles


def _answers(plan: Plan, measured: SideBySide | None) -> list[Row]:
    """Answers of both models: those just asked, or the examples of the compile."""
    if measured:
        return measured.rows
    return [Row(each.prompt, "", each.full, each.compiled) for each in (plan.quality.examples if plan.quality else ())]


def _costs(measured: SideBySide) -> list[tuple[str, str, str, str]]:
    """(what, original, compiled, ratio) of time and memory."""
    ours, theirs = measured.compiled, measured.original
    rows: list[tuple[str, float | None, float, Callable[[float], str]]] = [
        ("time to the first token", theirs and theirs.first_ms, ours.first_ms, _milliseconds),
        ("time per later token", theirs and theirs.token_ms, ours.token_ms, _milliseconds),
        ("weights in memory", theirs and theirs.weight_bytes, ours.weight_bytes, _megabytes),
        ("largest KV cache", theirs and theirs.cache_bytes, ours.cache_bytes, _megabytes),
    ]
    return [
        (name, "" if before is None else written(before), written(after), f"{after / before:.2f}" if before else "")
        for name, before, after, written in rows
    ]


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"


def _tiles(program: Program, visual: int, sites: int) -> list[dict[str, str]]:
    counts = program.plan.visual_tokens(visual)
    stored, full = _weight_bytes(program)
    tiles = []
    if counts:
        tiles.append({"value": f"{counts[-1] / visual:.0%}", "label": "of the visual tokens reach the last layer"})
        tiles.append({"value": f"{sum(counts) / len(counts) / visual:.0%}", "label": "of them per layer, on average"})
    tiles.append(
        {"value": str(sites), "label": f"quantized sites, {len(left_out_rows(program.plan.left_out))} left out"}
    )
    share = f"{stored / full:.2f} of their size in 16 bits" if full else "no weights"
    tiles.append({"value": _megabytes(stored), "label": f"weights, {share}"})
    return tiles


def _weight_bytes(program: Program) -> tuple[int, int]:
    """(bytes of all weights as stored, bytes of the same weights with 16 bits each)."""
    tensors = stored_tensors(program).tensors
    stored = sum(tensor.nbytes for tensor in tensors.values())
    full = 0
    for name, tensor in tensors.items():
        if name.endswith(_PACKED):
            # Two codes per byte.
            full += tensor.numel() * 2 * 2
        elif not (name.endswith(_SCALE) and f"{name.removesuffix(_SCALE)}{_PACKED}" in tensors):
            full += tensor.numel() * 2
    return stored, full


def _megabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _visual_tokens(config: Any, drawn: list[Overlay] | None) -> tuple[int, bool]:
    """Visual tokens of one picture, and whether that is known."""
    if drawn and drawn[0].panels[0].total:
        return drawn[0].panels[0].total, True
    fixed = getattr(config, "image_seq_length", None)
    if isinstance(fixed, int) and fixed > 0:
        return fixed, True
    return _UNKNOWN_VISUAL, False


def _schedule_note(plan: Plan, visual: int, known: bool) -> str:
    size = (
        f"a picture of {visual} visual tokens"
        if known
        else f"{visual} visual tokens (pictures of this model vary in size)"
    )
    if not plan.cuts:
        return f"Visual tokens that each layer computes on, for {size}. No tokens are dropped."
    if plan.cuts[0].states is not None:
        return (
            f"Visual tokens that layers with cross-attention read, for {size}: rows of {plan.cuts[0].states}. Text is "
            "always kept."
        )
    return f"Visual tokens that each layer computes on, for {size}. Text tokens are always kept."


def _graphs(program: Program) -> list[dict[str, Any]]:
    """The layer before which tokens are cut first, and the last layer, of the prefill graph."""
    graph = program.graphs[PREFILL]
    names, text = layer_names(graph), graph_text(graph)
    by_index = {name.rsplit(".", 1)[-1]: name for name in names}
    chosen = {names[-1]: "the last layer"}
    of_states = [path.layer for path in graph.outputs if path.root == STATE and path.part == CROSS_KEPT]
    starts = of_states or [cut.layer + 1 for cut in program.plan.cuts]
    if starts and (first := by_index.get(str(starts[0]))):
        chosen = {first: "with the first cut before it"} | chosen
    return [
        {
            "layer": name,
            "title": title,
            "operators": sum(not node.outside for node in layer_nodes(graph, name)),
            "svg": layer_svg(graph, name, standalone=False),
            "text": layer_text(text, name),
        }
        for name, title in chosen.items()
    ]
