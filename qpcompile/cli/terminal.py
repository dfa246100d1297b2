"""Terminal output: tables and notes, and errors as what, where and what to do."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qpcompile.errors import OutputError, QPCompileError
from qpcompile.versions import tell_newer
from qpcompile.write_errors import shown

if TYPE_CHECKING:
    from qpcompile.cli.doctor import Diagnosis
    from qpcompile.cli.dry_run import Forecast
    from qpcompile.compiled import CompiledVLM
    from qpcompile.evaluate.report.question_groups import Scores
    from qpcompile.evaluate.run.rows import Row
    from qpcompile.ranks import Ranks
    from qpcompile.recipe.plan import Plan, Site

FAILED, INTERRUPTED = 1, 130


class Stopped(BaseException):
    """Raised on a termination signal; not an Exception, so that only cleanup code handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def told_as_text(debug: bool) -> Iterator[None]:
    """Turn our errors into text and exit code 1, signals into 128 + their number; with `debug` the traceback comes
    first.

    stdout is flushed when the block ends, so that a full disk is an error too.
    """
    try:
        with _results():
            yield
    except KeyboardInterrupt:
        _complain("interrupted; no file was left half-written")
        raise typer.Exit(INTERRUPTED) from None
    except Stopped as stopped:
        _complain(f"stopped by {signal.Signals(stopped.number).name}; no file was left half-written")
        raise typer.Exit(128 + stopped.number) from None
    except QPCompileError as error:
        if debug:
            typer.echo(traceback.format_exc(), err=True)
        text = str(error) if debug else f"{error}\n  more: --debug shows the traceback"
        _complain(f"error: {text}")
        raise typer.Exit(FAILED) from None


@contextmanager
def _results() -> Iterator[None]:
    """Turn stdout errors into ours, except for a closed pipe, which is not an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe. Python would report the unflushed rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(
            f"the results cannot be written: {error.strerror}", where="stdout", do="send them to a place with room"
        ) from error


@contextmanager
def standing_streams() -> Iterator[None]:
    """Ensure that all three standard streams are open and accept every character.

    The descriptor of a closed one would be reused for the next file, and library output would be written there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    yield


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by an exception, so that partial work is cleaned up.

    A signal that the caller ignores (nohup) stays ignored.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def quiet_libraries() -> None:
    """Log our progress if there is no terminal; disable progress bars and warnings of transformers.

    Logs one line if a library is newer than any tested version.

    Imports transformers, which takes a second.
    """
    log = logging.getLogger("qpcompile")
    if not log.handlers:
        log.addHandler(_Notes())
        log.setLevel(logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tell_newer()


def quiet_rank(ranks: Ranks) -> None:
    """Let only rank 0 log; errors are told by every rank."""
    if not ranks.leads:
        logging.getLogger("qpcompile").setLevel(logging.ERROR)


class _Notes(logging.Handler):
    """Log lines as notes: a handler of logging's own would keep a stderr that is closed by then."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def note(text: str) -> None:
    """Print a note to stderr."""
    typer.echo(text, err=True)


def _complain(text: str) -> None:
    typer.secho(text, fg="red", err=True)


def console() -> Console:
    """The console for results; created on demand, so that a replaced stdout is respected."""
    return Console(highlight=False, soft_wrap=False)


def table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A plain table."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def show_forecast(forecast: Forecast) -> None:
    """Print the forecast."""
    rows = [(str(number), name, words) for number, (name, words) in enumerate(forecast.steps, 1)]
    out = console()
    out.print(f"model: {forecast.model}", markup=False)
    out.print(f"calibration samples: {forecast.samples or 'none'}")
    out.print(table("passes", ("", "pass", "what it would do"), rows))


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the diagnosis."""
    out = console()
    out.print(table("machine", ("", ""), list(diagnosis.machine.items())))
    packages = [(item.name, item.version or "-", item.tested, item.verdict) for item in diagnosis.packages]
    out.print(table("packages", ("package", "installed", "tested", ""), packages))
    operators = [
        (state.name, *("yes" if backend.runs else "no" for backend in state.backends.values()))
        for state in diagnosis.operators
    ]
    out.print(table("operators", ("operator", *diagnosis.operators[0].backends), operators))
    for reason, places in _reasons(diagnosis).items():
        out.print(f"  {reason}: {', '.join(places)}", markup=False)
    presets = [(state.name, state.speed, state.why) for state in diagnosis.presets]
    out.print(table("presets on the processor", ("preset", "runs", "why"), presets))
    out.print("Compiled models run on the processor; on a GPU the operators run on their own.")


def _reasons(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """Reason or remark -> operators, each reason once per back end."""
    reasons: dict[str, list[str]] = {}
    for state in diagnosis.operators:
        for name, backend in state.backends.items():
            if backend.note:
                reasons.setdefault(f"{name}: {backend.note}", []).append(state.name)
    return reasons


def show_quality(plan: Plan) -> None:
    """Print which tokens a search keeps, how far the compiled model agrees with full precision, what lost it, and some
    answers of both.
    """
    from qpcompile.quality.choice_table import HEADS, how_chosen, price_rows
    from qpcompile.quality.verdict import increments, verdict

    out, quality = console(), plan.quality
    if plan.choice is not None:
        rows = [tuple(map(shown, row)) for row in price_rows(plan.choice)]
        out.print(table(f"tokens: {how_chosen(plan.choice)}", HEADS, rows))
        if plan.choice.warning:
            out.print(f"warning: {plan.choice.warning}", markup=False, soft_wrap=True)
    if quality is None:
        out.print("agreement with full precision: not measured")
        return
    out.print(f"agreement with full precision: {verdict(quality)}", markup=False, soft_wrap=True)
    if quality.raised:
        out.print(f"raised to reach it: {', '.join(map(shown, quality.raised))}", markup=False, soft_wrap=True)
    lost = {loss.cause: loss for loss in quality.losses}
    rows = [
        (shown(cause), f"{added:+.3g}", f"{lost[cause].equal_answers} of {quality.samples}")
        for cause, added in increments(quality)
    ]
    if rows:
        out.print(table("lost to", ("", "nats per token", "equal answers after it"), rows))
    if quality.examples:
        answers = [(shown(each.full), shown(each.compiled)) for each in quality.examples]
        out.print(table("answers", ("full precision", "compiled"), answers))


def show_model(compiled: CompiledVLM) -> None:
    """Print a compiled model on one screen: graphs, decisions, quantized sites, sites left out."""
    from qpcompile.recipe.bits_told import told_bits

    plan, graphs = compiled.plan, compiled.program.graphs
    out = console()
    facts = [
        ("model", type(compiled.program.host).__name__),
        ("decoder layers", str(len(plan.layers))),
        ("weights", f"{compiled.weight_bytes() / 1e6:.2f} MB in all"),
        ("calibration", f"{plan.calibration.samples} samples" if plan.calibration.samples else "none"),
        ("compiled with", ", ".join(f"{name} {version}" for name, version in plan.versions.items()) or "-"),
    ]
    out.print(table("model", ("", ""), facts))
    sizes = [
        (name, graph.owner or "-", str(len(graph.nodes)), f"{compiled.weight_bytes(name) / 1e6:.2f} MB")
        for name, graph in graphs.items()
    ]
    out.print(table("graphs", ("graph", "module", "nodes", "weights"), sizes))
    show_quality(plan)
    if plan.cuts:
        out.print(table("visual tokens", ("cut after layer", "share kept", "fraction"), _cuts(plan)))
    else:
        out.print("visual tokens: all are kept in every layer")
    if plan.sites:
        kinds = Counter((site.graph, _bits(site), site.kernel) for site in plan.sites)
        rows = [(graph, bits, kernel, str(count)) for (graph, bits, kernel), count in sorted(kinds.items())]
        out.print(table("quantized sites", ("graph", "bits", "kernel", "sites"), rows))
    for line in told_bits(plan):
        out.print(line)
    if plan.left_out:
        why = Counter((item.graph, item.reason) for item in plan.left_out)
        rows = [(graph, reason, str(count)) for (graph, reason), count in sorted(why.items())]
        out.print(table("left out", ("graph", "reason", "sites"), rows))


def show_rows(rows: Sequence[Row]) -> None:
    """Print a table of results."""
    from qpcompile.cli.evaluate import HEADS, HEADS_MEAN, named, table_cells

    out = console()
    out.print(table("results, 95 % intervals by paired bootstrap", HEADS, table_cells(rows)))
    out.print(HEADS_MEAN)
    show_groups([(named(row), row.groups, row.accuracy) for row in rows], rows[0].questions)


def show_groups(rows: Sequence[tuple[str, Scores, float]], questions: int) -> None:
    """Print name, scores by group of questions and accuracy of rows, if the questions are in groups."""
    from qpcompile.evaluate.report.question_groups import COUNTED, counts, heads, percents

    _, scores, _ = rows[0]
    if scores:
        lines = [(COUNTED, *counts(scores, questions))]
        lines += [(name, *percents([found], [accuracy])) for name, found, accuracy in rows]
        console().print(table("accuracy in % by group of questions", ("row", *heads(scores)), lines))


def _cuts(plan: Plan) -> list[tuple[str, ...]]:
    return [(str(cut.layer), f"{cut.ratio:.4f}", f"{cut.numerator}/{cut.denominator}") for cut in plan.cuts]


def _bits(site: Site) -> str:
    if site.cache_bits is not None:
        return f"KV{site.cache_bits}"
    return f"W{site.weight_bits}A{site.activation_bits}"
