"""Everything that waits for a GPU, in one run of at most ten minutes: python tests/bench/gpu_session.py [--minutes 10]

Tests of the kernels and of compiles on the GPU, tuning of the tiles that matter, the linear layers, and whole answers
of a 7B model with and without CUDA graphs. Each step is a process with a time limit of its own, and ends with the
session; what it says is in build/gpu/<step>.txt, and the summary is written after each step, so that nothing is lost
when the machine is taken away. --rehearse runs what can run without a GPU: the steps that need one must say so.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
NO_GPU = 2
PYTEST = ("-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-m", "gpu", "--maxfail=20")
SHAPES = ("--models", "LLaVA-1.5-7B", "--batches", "1", "--rounds", "3", "--new-tokens", "32")


@dataclass(frozen=True)
class Step:
    """One process: python `arguments`, for at most `seconds`; rehearsed: its arguments without a GPU."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    rehearsed: tuple[str, ...] | None = None


@dataclass
class Outcome:
    """How a step ended, after how many seconds."""

    step: Step
    said: str = "not reached"
    seconds: float = 0.0
    last: list[str] = field(default_factory=list)


TESTS = ROOT / "tests" / "kernels" / "gpu"
STEPS = (
    Step("doctor", ("-m", "qpcompile", "doctor"), 60),
    # First what is wrong if anything is: the kernels, then what the compiler decides.
    Step("kernels are right", (*PYTEST, str(TESTS / "test_operators.py"), str(TESTS / "test_linear_int.py")), 120),
    Step("compile on the GPU", (*PYTEST, str(TESTS / "test_compile.py"), "-k", "llava"), 150),
    Step("answers are right", (*PYTEST, str(TESTS / "test_generate.py"), "-k", "llava"), 150),
    Step("tuning", (str(BENCH / "tune.py"), "--seconds", "60"), 90),
    Step("linear layers", (str(BENCH / "gpu.py"), "--tokens", "1", "640", "--layers", "gate_up", "o"), 90),
    Step(
        "answers of a 7B",
        (str(BENCH / "gpu_answers.py"), *SHAPES),
        240,
        (str(BENCH / "gpu_answers.py"), "--device", "cpu", "--models", "tiny-A", "--peers", "ours:quota-30",
         "--batches", "1", "--rounds", "1", "--new-tokens", "2", "--out", str(ROOT / "build" / "gpu")),
    ),
)  # fmt: skip


def run(step: Step, arguments: Sequence[str], seconds: float, folder: Path) -> Outcome:
    """Run a step, killing it and what it has started at the end of its time; its words go to a file of the folder."""
    path = folder / f"{step.name.replace(' ', '-')}.txt"
    started, ended = time.monotonic(), True
    with path.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = {0: "done", NO_GPU: "needs a GPU"}.get(child.returncode, f"failed (exit code {child.returncode})")
    return Outcome(step, said if ended else "out of time", time.monotonic() - started, lines[-12:])


def summary(outcomes: Sequence[Outcome], title: str) -> str:
    """The page: versions, a row per step, and the last lines of what did not end well."""
    known = {}
    for name in ("qpcompile", "torch", "triton", "transformers"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = "not installed"
    lines = [
        f"# {title}",
        "",
        "Written by `make gpu` (tests/bench/gpu_session.py).",
        "",
        f"- {', '.join(f'{name} {each}' for name, each in known.items())}, Python {platform.python_version()}",
        "",
        "| step | outcome | seconds | limit |",
        "| --- | --- | --- | --- |",
        *(f"| {each.step.name} | {each.said} | {each.seconds:.0f} | {each.step.seconds} |" for each in outcomes),
    ]
    for each in outcomes:
        if each.said not in ("done", "not reached"):
            lines += ["", f"{each.step.name}:", "", "```", *each.last, "```"]
    return "\n".join(lines) + "\n"


def session(steps: Sequence[Step], minutes: float, folder: Path, page: Path, title: str, rehearse: bool) -> int:
    """Run the steps until the time is over; returns 1 if one did not end well."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    outcomes = [Outcome(step) for step in steps]
    for place, step in enumerate(steps):
        left = min(step.seconds, end - time.monotonic())
        if left > 0:
            arguments = step.rehearsed if rehearse and step.rehearsed is not None else step.arguments
            print(f"{step.name}: at most {left:.0f} s", flush=True)
            outcomes[place] = run(step, arguments, left, folder)
            print(f"{step.name}: {outcomes[place].said}, {outcomes[place].seconds:.0f} s", flush=True)
        page.write_text(summary(outcomes, title), encoding="utf-8")
    print(f"wrote {page}")
    fine = {"done", "needs a GPU"} if rehearse else {"done"}
    return int(any(each.said not in fine for each in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the session; returns 2 without a GPU, unless it is rehearsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rehearse", action="store_true", help="run what can run without a GPU")
    options = parser.parse_args(arguments)
    import torch

    from qpcompile.kernels.linear_int.tuning import slug

    folder = ROOT / "build" / "gpu"
    if not torch.cuda.is_available() and not options.rehearse:
        print("the session needs a CUDA GPU, and torch finds none here (--rehearse needs none)", file=sys.stderr)
        return NO_GPU
    if options.rehearse:
        return session(STEPS, options.minutes, folder, folder / "rehearsal.md", "Rehearsal without a GPU", True)
    gpu = torch.cuda.get_device_name(0)
    page = ROOT / "docs" / "results" / f"session-{slug(gpu)}.md"
    return session(STEPS, options.minutes, folder, page, f"What ran on {gpu}", False)


if __name__ == "__main__":
    sys.exit(main())
