"""Run `qpcompile compile` under a memory limit, and print the seconds and the peak of each pass.

    python tests/bench/disk_checkpoint.py build/disk --layers 20
    python tests/bench/compile_disk.py --limit 6 -- build/disk --output build/disk-out --offload build/new \
      --data tests/testbed/calibration/qwen2_5_vl --recipe w4a4kv4 --set quantize.transform=hadamard

The limit is RLIMIT_DATA of the command: what it may allocate and map for writing. Files mapped for reading are not in
it: the system drops their pages when it needs room, and reads them again. Each line of the command's stderr is printed
after the largest values since the last one, of 50 a second: anonymous memory (RssAnon, which cannot be dropped without
swap) and mapped files in memory (RssFile). Linux only.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

GIB = 2**30
COMMAND = "from qpcompile.cli.main import main; main()"


def main() -> int:
    """Run the command; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, help="GiB; default: none")
    parser.add_argument("arguments", nargs="+", help="of `qpcompile compile`, after --")
    options = parser.parse_args()
    limit = None if options.limit is None else int(options.limit * GIB)

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-c", COMMAND, "compile", *options.arguments]
    started = time.monotonic()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limited)
    peaks = Peaks(child.pid)
    watching = threading.Thread(target=peaks.watch, daemon=True)
    watching.start()
    assert child.stderr is not None
    for line in child.stderr:
        anonymous, files = peaks.since()
        print(f"{anonymous / GIB:6.2f} {files / GIB:6.2f} GiB  {line}", end="", flush=True)
    code = child.wait()
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit_text = "no limit" if limit is None else f"limit {options.limit:g} GiB"
    print(
        f"peak {max(peaks.all) / GIB:.2f} GiB of anonymous memory, {limit_text}; {seconds:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time; {used.ru_majflt} major faults; exit code {code}"
    )
    return code


class Peaks:
    """The largest anonymous memory and mapped files of a process, in bytes."""

    def __init__(self, process: int) -> None:
        self.status = Path(f"/proc/{process}/status")
        self.all = [0]
        self._anonymous = self._files = 0

    def watch(self) -> None:
        """Sample until the process ends."""
        while True:
            try:
                text = self.status.read_text(encoding="ascii")
            except OSError:
                return
            found = dict(line.split(":", 1) for line in text.splitlines())
            if "RssAnon" not in found:
                return
            anonymous, files = (int(found[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
            self._anonymous, self._files = max(self._anonymous, anonymous), max(self._files, files)
            time.sleep(0.02)

    def since(self) -> tuple[int, int]:
        """The peaks since the last call."""
        found = self._anonymous, self._files
        self.all.append(found[0])
        self._anonymous = self._files = 0
        return found


if __name__ == "__main__":
    sys.exit(main())
