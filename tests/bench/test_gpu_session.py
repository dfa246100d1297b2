"""The session on a GPU keeps its time, writes what happened after every step, and hides nothing that went wrong."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from gpu_session import STEPS, Step, session

SLEEP = "import time; time.sleep(611)"
SLEEPS = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); time.sleep(611)"
GOOD = Step("good", ("-c", "print('fine')"), 30)
BAD = Step("bad", ("-c", "print('first'); raise SystemExit(3)"), 30)
NEEDS = Step("needs one", ("-c", "raise SystemExit(2)"), 30)
SLOW = Step("slow", ("-c", f"print('begun', flush=True); {SLEEPS}"), 2)


def ran(steps: list[Step], folder: Path, minutes: float = 1.0, rehearse: bool = False) -> tuple[int, str]:
    page = folder / "page.md"
    code = session(steps, minutes, folder / "words", page, "What ran", rehearse)
    return code, page.read_text()


def test_all_is_well(tmp_path: Path) -> None:
    code, page = ran([GOOD], tmp_path)
    assert code == 0 and "| good | done | " in page and "torch 2." in page
    assert (tmp_path / "words" / "good.txt").read_text() == "fine\n"


def test_what_goes_wrong_is_told_and_the_rest_runs(tmp_path: Path) -> None:
    code, page = ran([BAD, NEEDS, GOOD], tmp_path)
    assert code == 1 and "| bad | failed (exit code 3) |" in page and "| good | done |" in page
    assert "bad:\n\n```\nfirst\n```" in page
    assert ran([NEEDS, GOOD], tmp_path)[0] == 1 and ran([NEEDS, GOOD], tmp_path, rehearse=True)[0] == 0


def test_a_step_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code, page = ran([SLOW, GOOD], tmp_path)
    assert code == 1 and "| slow | out of time | 2 | 2 |" in page and "| good | done |" in page
    assert "begun" in page
    assert not [each for each in psutil.process_iter(["cmdline"]) if "sleep(611)" in str(each.info["cmdline"])]


def test_the_session_ends_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    code, page = ran([Step("slow", SLOW.arguments, 100), GOOD], tmp_path, minutes=1 / 60)
    assert time.monotonic() - started < 20
    assert code == 1 and "| slow | out of time | 1 | 100 |" in page and "| good | not reached | 0 | 30 |" in page


def test_steps_have_names_of_their_own_and_fit_in_a_quarter_of_an_hour() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.seconds for step in STEPS) <= 15 * 60
