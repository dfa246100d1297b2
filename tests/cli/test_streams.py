"""The command line without a terminal, with closed streams, with a broken pipe, and with signals."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from qpcompile.cli.terminal import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]
# The command line's own `main` around a command of a few lines: these tests need no model.
SCRIPT = """
import sys, time
from pathlib import Path
import typer
from qpcompile.cli import terminal
from qpcompile.claims import claimed
from qpcompile.errors import RecipeError

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def main(what: str, folder: Path):
    with terminal.told_as_text(False):
        if what == "lines":
            for number in range(20000):
                typer.echo(f"line {number}")
        if what == "line":
            typer.echo("naïve ≈ \U0001f422")
            terminal.note("naïve ≈ \U0001f422")
        if what == "table":
            terminal.console().print(terminal.table("é table", ("héad", "two"), [("[bold]x", "≈" * 30)]))
        if what == "error":
            raise RecipeError("é is not a key", where="\U0001f422", do="name another")
        if what == "descriptor":
            with open(folder / "file", "w") as file:
                print("to stdout", flush=True)
                print("to stderr", file=sys.stderr, flush=True)
                file.write(str(file.fileno()))
        if what == "wait":
            with claimed(folder / "out", "folder") as claim:
                (claim.aside / "half").write_text("half")
                (folder / "ready").touch()
                time.sleep(60)

with terminal.standing_streams(), terminal.stopped_by_signals():
    app()
"""


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `$RUN` in a shell, which is the script above."""
    (folder / "script.py").write_text(SCRIPT)
    given = {**os.environ, "PYTHONPATH": str(ROOT), "RUN": f"{sys.executable} {folder / 'script.py'}", **variables}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=given, capture_output=True, encoding="utf-8", timeout=120
    )
    assert "Traceback" not in done.stderr + done.stdout and "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("$RUN lines . | head -1; exit ${PIPESTATUS[0]}", 1),
        ("$RUN lines . > /dev/full", 1),
        ("$RUN line . > /dev/full", 1),
        ("$RUN lines . >&-", 0),
        ("$RUN line . 2>&-", 0),
        ("$RUN line . <&- >&- 2>&-", 0),
        ("$RUN error . 2>&-", 1),
        ("$RUN error . >&-", 1),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, tmp_path: Path) -> None:
    assert shell(command, tmp_path).returncode == code


def test_a_full_disk_behind_stdout_is_said(tmp_path: Path) -> None:
    assert "the results cannot be written: No space left" in shell("$RUN line . > /dev/full", tmp_path).stderr


def test_closed_streams_are_not_reused_for_files(tmp_path: Path) -> None:
    assert shell("$RUN descriptor . <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "file").read_text().isdigit() and int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"},
        {"COLUMNS": "20"},
        {"COLUMNS": "1"},
    ],
)
def test_terminals_that_know_little(variables: dict[str, str], tmp_path: Path) -> None:
    for what, code in (("line", 0), ("table", 0), ("error", 1)):
        done = shell(f"$RUN {what} .", tmp_path, **variables)
        assert done.returncode == code and done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_half_written(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py"), "wait", str(tmp_path)]
    # A test that runs in the background would inherit that the signal is ignored.
    heard = signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True)
    signal.signal(number, heard)
    with process:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "no file was left half-written" in said and "Trace" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready", "script.py"]


def test_log_lines_go_to_the_standard_error_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls commands one after another may exchange its streams in between."""
    log = logging.getLogger("qpcompile")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    for text in ("first", "second"):
        with redirect_stderr(io.StringIO()) as stream:
            quiet_libraries()
            log.info("%s command", text)
        assert stream.getvalue().splitlines()[-1] == f"{text} command"
        stream.close()
