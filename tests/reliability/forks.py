"""Processes to kill, forked from one that has imported and captured everything: a compile then takes seconds.

A child redirects what it prints to a file and ends by `os._exit` with one of the codes below.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# When run as a script, this folder is on the path, but not its parent.
sys.path[1:1] = [str(TESTS), str(TESTS.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from programs import captured, fresh  # noqa: E402

from qpcompile.claims import claimed, held_folder  # noqa: E402
from qpcompile.errors import QPCompileError  # noqa: E402
from qpcompile.ir import checkpoint as checkpoints  # noqa: E402
from qpcompile.pipeline import checkpoint_key, compile_captured  # noqa: E402
from qpcompile.recipe.recipe import Recipe  # noqa: E402

DONE, REFUSED, BARE = 0, 10, 20
COUNT = 3
# Calibration, training, sensitivity, cuts and GPTQ: everything that writes into a `--resume` folder, except the search
# of `joint`, which takes as long as all the rest.
SETTINGS = (
    "tokens.method=quota",
    "tokens.keep=0.3",
    "quantize.transform=flatquant",
    "quantize.smooth=null",
    "quantize.training.epochs=1",
)


class Prompts:
    """Three samples, which can be iterated over repeatedly."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _, cases, _ = captured()
        return iter((cases["one"], cases["longer"], cases["one"]))

    def __len__(self) -> int:
        return COUNT

    def digest(self) -> str:
        return hashlib.sha256(b"three prompts").hexdigest()


def recipe() -> Recipe:
    """The recipe of all compiles here."""
    return Recipe.load("w4a4kv4").with_overrides(list(SETTINGS))


def compile_into(out: Path, progress: Path) -> None:
    """`qpcompile compile --output --resume` after capture; saves progress wherever it can."""
    checkpoints.SECONDS = -1.0
    samples: Any = Prompts()
    with claimed(out, "folder") as claim, held_folder(progress) as folder:
        program = fresh(recipe())
        program.checkpoint = checkpoints.Checkpoint.open(folder, checkpoint_key(program, samples))
        compile_captured(program, None, samples).save_pretrained(claim)


def ready() -> None:
    """Import and capture what children need. No gradients here: a process that has used autograd cannot be forked."""
    torch.set_num_threads(1)
    captured()


def fork(work: Callable[[], None], log: Path) -> int:
    """A child that does `work`; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = BARE
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = DONE
    except QPCompileError as error:
        print(error, flush=True)
        code = REFUSED
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 (a child always ends here)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int | None:
    """Kill a child after the given seconds; its exit code if it ended before, None if it was killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    wait(child)
    return None


def outcome(code: int) -> str:
    """The column of a tally for an exit code other than DONE."""
    return "refused" if code == REFUSED else "crashed" if code < 0 else "bare"


def content(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
