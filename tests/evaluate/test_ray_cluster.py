"""A real Ray of two workers on this machine: the tables of a run without it, though a worker is killed on the way."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qpcompile.errors import KernelError
from qpcompile.evaluate.report.sweep_report import write_sweep
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, RowRunner, all_rows
from qpcompile.evaluate.sweep.plan import SweepPlan
from qpcompile.evaluate.sweep.sweep import sweep
from tests.evaluate.full_disk import contents
from tests.evaluate.test_rows import MODEL, TESTBED, exam

DATA = TESTBED / "calibration" / "llava"
PLAN = f"""
version: 1
beds: [{{name: bed, model: {MODEL}, data: {DATA}, calibration: {DATA}, batch_size: 4}}]
questions: 4
max_new_tokens: 2
samples: 1
seeds: [0]
shares: [0.6, 0.2]
reference: random
quantizers: {{fp16: {{}}}}
pruners: {{none: {{}}, random: {{set: [tokens.method=random, "tokens.candidate_layers=[1]"]}}}}
"""
SECONDS = re.compile(r'("(?:compile|answer)_seconds": )[\d.e-]+')


@pytest.fixture(scope="module")
def runner() -> Iterator[RowRunner]:
    """Rows on two workers."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from qpcompile.evaluate.run.ray_rows import GIB, Needs, OnRay

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield OnRay(Needs(1, 0, GIB), TOLD.append, may_grow=False)
    ray.shutdown()


TOLD: list[str] = []


def rows_of(folder: Path) -> dict[str, str]:
    """The files of a sweep but for times; of the table, what its questions were asked for."""
    files = {name: data.decode() for name, data in contents(folder).items() if name.endswith((".json", ".md"))}
    return {name: SECONDS.sub(r"\g<1>0", text).replace(str(folder), "") for name, text in files.items()}


def workers() -> list[psutil.Process]:
    """Workers of this process's Ray that compute a row."""
    return [each for each in psutil.Process().children(recursive=True) if "ray::qpcompile row" in title(each)]


def title(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_the_same_tables_with_two_workers_one_of_them_killed(runner: RowRunner, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = SweepPlan.load(tmp_path / "plan.yaml")
    killed: list[int] = []

    def say(text: str) -> None:
        if not killed and text.startswith("[1 of"):
            victim = workers()[0]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    results = sweep(plan, tmp_path / "ray", say, None, runner)
    write_sweep(plan, results, tmp_path / "ray", "it")
    assert killed and len([text for text in TOLD if "WorkerCrashedError); asked for again, attempt 2" in text]) == 1
    write_sweep(plan, sweep(plan, tmp_path / "here", lambda text: None), tmp_path / "here", "it")
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "here")
    assert [result.row is None for result in results] == [False, False, False, True]


@pytest.mark.slow
def test_a_device_that_workers_lack_is_an_error_of_ours(runner: RowRunner) -> None:
    import torch

    examiner = Examiner(MODEL, exam(1), None, None, torch.device("xpu"))
    with pytest.raises(KernelError, match="passes cannot compute on xpu"):
        all_rows([Ask(examiner, "full", None)], runner)
