"""Short forms of the reliability scripts; the long ones have a command each, see README.md."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_compiles_leave_nothing_half_written(capsys: pytest.CaptureFixture[str]) -> None:
    import kills

    assert kills.main(["--count", "3", "--seed", "1"]) == 0
    assert "| SIGKILL of a compile, then resumed | 3 | 0 | 3 |" in capsys.readouterr().out


@pytest.mark.slow
def test_second_compiles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import two_compiles

    assert two_compiles.main(["--count", "1"]) == 0
    assert "| a second compile into one output | 1 | 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_load(capsys: pytest.CaptureFixture[str]) -> None:
    import load

    assert load.main(["--threads", "2", "--each", "5", "--answers", "20", "--warm", "10", "--seed", "1"]) in (0, 1)
    assert "| answers from 2 threads | 10 | 0 | 10 |" in capsys.readouterr().out


@pytest.mark.slow
def test_writers_on_every_name_and_disk() -> None:
    """Run as a separate command: children write to standard streams, which pytest replaces here."""
    script = Path(__file__).with_name("accidents.py")
    done = subprocess.run([sys.executable, script, "--writers", "rows", "progress"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
