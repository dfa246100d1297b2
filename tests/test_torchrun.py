"""Compiles by several processes, as `torchrun` starts them: the bytes of one process, and the end of all with one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

from qpcompile.capture.load import load_model
from qpcompile.cli.main import app
from qpcompile.errors import RankError
from qpcompile.torchrun import asked_size, joined

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "testbed" / "calibration" / "llava"
SETTINGS = ("calibration.samples=5", "quality.samples=3", "quantize.training.epochs=1", "quantize.training.samples=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    load_model(folder)
    return folder


def command(processes: int, model: Path, output: Path, *options: str, recipe: str = "w4a4kv4") -> list[str]:
    """A compile by this many processes."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    changed = [part for setting in SETTINGS for part in ("--set", setting)]
    asked = ["compile", str(model), "--recipe", recipe, "--data", str(DATA), "--output", str(output), *changed]
    return [sys.executable, *launch, "-m", "qpcompile", *asked, *options]


def environment() -> dict[str, str]:
    """Without the variables of a launcher around the tests; one thread, since sums depend on their number."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: text for name, text in os.environ.items() if name not in left_out}
    return {**given, "OMP_NUM_THREADS": "1"}


def run(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(given, env=environment(), capture_output=True, text=True, timeout=900, check=False)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_write_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    untrained = ("--set", "quantize.transform=hadamard")  # test_ranks.py trains
    one, two = (
        run(*command(count, model, tmp_path / str(count), "--report", f"{tmp_path}/{count}.html", *untrained))
        for count in (1, 2)
    )
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert hashes(tmp_path / "2") == hashes(tmp_path / "1")
    assert (tmp_path / "2.html").is_file()
    # Progress and results of rank 0 only.
    assert two.stderr.count("quantize_weights: done") == one.stderr.count("quantize_weights: done") == 1
    assert two.stderr.count(" calibrate prefill: ") == one.stderr.count(" calibrate prefill: ")
    assert two.stdout == one.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quota-30", "joint-30", "w4a8kv4"])
def test_four_processes_write_the_bytes_of_one(recipe: str, model: Path, tmp_path: Path) -> None:
    for count in (1, 4):
        done = run(*command(count, model, tmp_path / str(count), recipe=recipe))
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "4") == hashes(tmp_path / "1")


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of a running compile, in order."""
    found = psutil.Process(process.pid).children()
    return sorted(found, key=lambda each: int(each.environ()["RANK"]))


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; torchrun may not have fetched its exit code yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lines_until(process: subprocess.Popen[str], text: str) -> Iterator[str]:
    """What a process prints up to this text."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if text in line:
            return


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "after"), [(1, "calibrate: "), (0, "train_transforms: "), (3, "insert_quant_stubs: ")]
)
def test_a_killed_rank_ends_all_and_the_compile_resumes(victim: int, after: str, model: Path, tmp_path: Path) -> None:
    out, resume = tmp_path / "out", ("--resume", str(tmp_path / "progress"))
    with subprocess.Popen(
        command(4, model, out, *resume), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        printed = "".join(lines_until(process, after))
        started = ranks(process)
        assert len(started) == 4, printed
        began = time.monotonic()
        started[victim].send_signal(signal.SIGKILL)
        while any(map(runs, started)) and time.monotonic() - began < 10:
            time.sleep(0.1)
        alive = [place for place, each in enumerate(started) if runs(each)]
        assert not alive, f"ranks {alive} still run after 10 s"
        print(f"all had ended after {time.monotonic() - began:.1f} s")
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode != 0 and not out.exists()
    assert told.count(f"error: rank {victim} has ended before the compile was done") >= 1, told
    assert "terminate called" not in told and "InvariantError" not in told, told
    again = run(*command(4, model, out, *resume))
    assert again.returncode == 0, again.stderr
    whole = run(*command(1, model, tmp_path / "whole"))
    assert whole.returncode == 0 and hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number of processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is '-1'"),
    ],
)
def test_an_incomplete_environment_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(RankError, match=message), joined():
        pass


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert asked_size() == 1
    with joined() as found:
        assert found.leads and found.size == 1 and found.mine(7)


def test_other_commands_are_not_started_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would do all of it."""
    for name, text in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, text)
    for command_name, code in (("doctor", 1), ("compile", 2)):
        done = CliRunner().invoke(app, [command_name])
        assert done.exit_code == code, done.output
        assert ("only `compile` shares its work" in done.output) == (command_name == "doctor")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "only `compile`" not in CliRunner().invoke(app, ["compile"]).output
