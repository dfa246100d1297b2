"""Disks that are full, read-only or unreadable, and names of every kind: python tests/reliability/accidents.py

Every writer of the package tries to write to every such place: a compiled model, its report, its ONNX folder, rows of
results and the progress of a compile. It writes everything, or is refused by name and leaves no files. Full and
read-only disks are mounted in a separate namespace and places without permission are tried as another user, both of
which need root: without it they are skipped, and the script says so.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import forks
import torch
from load import compiled
from tally import Tally, begin, finish

from qpcompile.claims import held_folder
from qpcompile.files import replace_file
from qpcompile.ir.checkpoint import Checkpoint

NOBODY, NEW_NAMESPACE = 65534, 0x00020000
NAMES = {
    "a name of 255 bytes": "x" * 255,
    "a name of 256 bytes": "x" * 256,
    "120 accented letters": "é" * 120,
    "a name with a newline": "a\nb",
    "a name that is not UTF-8": "\udcff",
    "a name with a lone surrogate": "\ud800",
    "a name with NUL": "a\0b",
    "an emoji": "🐢",
}
WRITERS = ("artifact", "report", "onnx", "rows", "progress")
DISKS = (("8k", False), ("100k", False), ("100k", True))
Writer = Callable[[Path], None]


def writers(asked: Sequence[str]) -> dict[str, Writer]:
    """The writers by name of their output; each takes the path of the output."""
    found: dict[str, Writer] = {"rows": _rows, "progress": _progress}
    if not set(asked) <= set(found):
        model = compiled()
        found |= {"artifact": model.save_pretrained, "report": model.report, "onnx": model.export_onnx}
    return {name: found[name] for name in asked}


def _rows(path: Path) -> None:
    with held_folder(path) as folder:
        for number in range(50):
            replace_file(folder / f"{number}.json", b"x" * 10_000)


def _progress(path: Path) -> None:
    with held_folder(path) as folder:
        Checkpoint.open(folder, "key").save("pass", {"x": torch.ones(100_000)}, {})


def tried(write: Writer, path: Path, log: Path, before: Callable[[], None] = lambda: None) -> str:
    """Write in a child process, after `before`; returns the outcome's column."""

    def work() -> None:
        before()
        write(path)

    code = forks.wait(forks.fork(work, log))
    said = log.read_text(errors="replace")
    if code == forks.DONE:
        return "same"
    if code != forks.REFUSED or "where:" not in said or "what to do:" not in said:
        print(said)
        return "bare" if code >= 0 else "crashed"
    return "refused"


def left(folder: Path) -> list[str]:
    """The files in a folder, except those that may remain in it."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".qpcompile") or path.name == ".partial"]


def names(work: Path, log: Path, made: dict[str, Writer]) -> Iterator[Tally]:
    """Names of every kind."""
    for what, name in NAMES.items():
        tally = Tally(what)
        for kind, write in made.items():
            place = work / kind / str(len(list(work.rglob("*"))))
            place.mkdir(parents=True)
            found = tried(write, Path(f"{place}/{name}"), log)
            wrong = left(place) or (found == "refused" and os.listdir(place))
            tally.add("changed" if wrong else found)
        yield tally


def disks(work: Path, log: Path, made: dict[str, Writer], size: str, read_only: bool) -> Tally:
    """A disk of this size in a separate namespace, where each writer has to be refused."""
    tally = Tally("a read-only disk" if read_only else f"a full disk ({size})")
    place = work / "disk"
    place.mkdir(exist_ok=True)

    def mount() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        options = f"size={size}" + (",ro" if read_only else "")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)

    for write in made.values():
        # Only the child can see what remains there.
        def checked(path: Path, write: Writer = write) -> None:
            try:
                write(path)
            finally:
                if found := [name for name in left(place) if name]:
                    print(found)
                    os._exit(forks.BARE)

        found = tried(checked, place / "out", log, mount)
        tally.add("changed" if found == "same" else found)
    return tally


def forbidden(work: Path, log: Path, made: dict[str, Writer], mode: int) -> Tally:
    """A folder of root's with this mode, as another user."""
    tally = Tally(f"a folder with mode {mode:o} of another user")
    place = work / f"forbidden-{mode:o}"
    place.mkdir()
    place.chmod(mode)
    for write in made.values():
        found = tried(write, place / "out", log, lambda: os.setuid(NOBODY))
        tally.add("changed" if found == "same" or os.listdir(place) else found)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=WRITERS)
    asked = parser.parse_args(arguments)
    begin(0)
    torch.set_num_threads(1)
    made = writers(asked.writers)
    # Another user may not read the interpreter's folder: import here what the report imports when it is written.
    importlib.import_module("qpcompile.inspect.report")
    with tempfile.TemporaryDirectory() as folder:
        work, log = Path(folder), Path(folder) / "log"
        work.chmod(0o755)
        tallies = list(names(work, log, made))
        if os.geteuid() == 0:
            tallies += [disks(work, log, made, size, read_only) for size, read_only in DISKS]
            log.touch(0o666)
            log.chmod(0o666)
            tallies += [forbidden(work, log, made, mode) for mode in (0o755, 0o000)]
        else:
            print("not root: full and read-only disks and forbidden folders are left out")
    return finish(tallies)


if __name__ == "__main__":
    raise SystemExit(main())
