"""A sweep in this process, on one Ray worker and on two: time, CPU time, and whether the tables are the same.

    OMP_NUM_THREADS=1 python tests/bench/ray_sweep.py build/ray --workers 0 1 2

0 is no Ray. CPU time is that of this process and of all workers, without Ray's own processes: on a machine that others
use it says what a wall clock cannot.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import psutil

from qpcompile.evaluate.report.sweep_report import write_sweep
from qpcompile.evaluate.run.row_runner import InProcess, RowRunner
from qpcompile.evaluate.sweep.plan import SweepPlan
from qpcompile.evaluate.sweep.sweep import sweep

BEDS = Path(__file__).resolve().parents[1] / "testbed"
MODEL, DATA = BEDS / "llava", BEDS / "calibration" / "llava"
PLAN = f"""
version: 1
beds: [{{name: llava, model: {MODEL}, data: {DATA}, calibration: {DATA}, batch_size: 8}}]
questions: QUESTIONS
max_new_tokens: 4
samples: 8
seeds: [0]
shares: [0.8, 0.7, 0.6]
reference: random
quantizers: {{w4a4: {{recipe: w4a4kv4, set: [quantize.weights.solver=rtn, quantize.transform=hadamard]}}}}
pruners: {{none: {{}}, random: {{set: [tokens.method=random]}}, quota: {{set: [tokens.method=quota]}}}}
"""


def workers() -> dict[int, float]:
    """CPU seconds of each process that computes rows for this one; so far, by process id."""
    found = {}
    for each in psutil.Process().children(recursive=True):
        try:
            if any("ray::" in word for word in each.cmdline()):
                found[each.pid] = sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return found


def measured(plan: SweepPlan, out: Path, count: int) -> tuple[float, float]:
    """Wall and CPU seconds of one sweep."""
    used: dict[int, float] = {}

    def say(text: str) -> None:
        print(f"  {text}", flush=True)
        used.update(workers())

    started, own = time.monotonic(), sum(psutil.Process().cpu_times()[:2])
    runner: RowRunner = InProcess()
    if count:
        import ray

        from qpcompile.evaluate.run.ray_rows import GIB, Needs, OnRay

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", num_cpus=count, **options)
        runner = OnRay(Needs(1, 0, GIB), say, may_grow=False)
    results = sweep(plan, out, say, None, runner)
    used.update(workers())
    seconds = time.monotonic() - started
    write_sweep(plan, results, out, "tests/bench/ray_sweep.py")
    if count:
        import ray

        ray.shutdown()
    return seconds, sum(psutil.Process().cpu_times()[:2]) - own + sum(used.values())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=32)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    (arguments.out / "plan.yaml").write_text(PLAN.replace("QUESTIONS", str(arguments.questions)))
    plan = SweepPlan.load(arguments.out / "plan.yaml")
    tables = set()
    for count in arguments.workers:
        print(f"{count} workers, load {os.getloadavg()[0]:.1f}", flush=True)
        seconds, processor = measured(plan, arguments.out / str(count), count)
        tables.add((arguments.out / str(count) / "tables.md").read_text())
        print(f"{count} workers: {seconds:.0f} s, {processor:.0f} s of CPU, load {os.getloadavg()[0]:.1f}", flush=True)
    print("tables are the same" if len(tables) == 1 else "TABLES DIFFER")


if __name__ == "__main__":
    main()
