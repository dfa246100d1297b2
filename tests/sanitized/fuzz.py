"""Call operators with mutated operands and report calls that neither refuse nor answer: fuzz.py SEED CALLS [FIRST]

Calls (calls.py) are made in another process, which may crash, or is ended if one takes SECONDS of CPU time. The call is
then named, and a new process continues after it. Call I of SEED is repeated by: fuzz.py SEED 1 I
"""

import faulthandler
import math
import queue
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field

SECONDS = 10
"""Of the processor for one call; most take a hundredth of one."""
SILENCE = 600
"""Seconds without a word from the process, on a busy machine; then it waits for something."""
PROGRESS = 30
MOST_DEATHS = 5


@dataclass
class Tally:
    """The messages so far; the last call that was begun, as text, and when."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[str, int] = field(default_factory=dict)
    last: int = -1
    what: str = ""
    begun: float = field(default_factory=time.monotonic)

    def take(self, line: str) -> None:
        """Handle one line of the process that makes the calls."""
        if line.startswith("@"):
            number, _, self.what = line[1:].partition(" ")
            self.last, self.begun = int(number), time.monotonic()
            return
        self.counts[line.partition(":")[0]] += 1
        if ":" in line:
            self.bad.setdefault(line, self.last)
            print(f"  call {self.last}: {line}", flush=True)

    def progress(self) -> str:
        """Print one line."""
        return f"  call {self.last}, since {time.monotonic() - self.begun:.0f} s: {self.what}; {dict(self.counts)}"


def work(seed: int, first: int, end: int) -> None:
    """The calls of one process; each is named before it is made, and ends the process if it takes too long."""
    import torch
    from calls import chosen, ending
    from operands import Draw

    from qpcompile.kernels.native import library as native

    if not native.available():
        sys.exit(native.library().problem)
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGXCPU, chain=True)
    for number in range(first, end):
        draw = Draw(f"{seed} {number}")
        torch.manual_seed(draw.randrange(2**31))
        call = chosen(draw)
        print(f"@{number} {call.what}", flush=True)
        # By the operating system: a Python exception would be lost inside a callback or a C function.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + SECONDS, resource.RLIM_INFINITY))
        print(ending(draw, call), flush=True)


def watch(seed: int, first: int, end: int, tally: Tally) -> str:
    """Run one process to its end and read its output; returns why it died, or an empty text."""
    command = [sys.executable, __file__, "--work", str(seed), str(first), str(end)]
    reported = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        while True:
            try:
                if not (line := lines.get(timeout=PROGRESS)):
                    break
                tally.take(line.rstrip())
            except queue.Empty:
                if time.monotonic() - tally.begun > SILENCE:
                    process.kill()
            if time.monotonic() - reported > PROGRESS:
                reported = time.monotonic()
                print(tally.progress(), flush=True)
    if process.returncode == -signal.SIGXCPU:
        return f"it took more than {SECONDS} s of the processor"
    return f"the process ended with {process.returncode}" if process.returncode else ""


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Every line that a process prints, then an empty one."""
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")


def main(seed: int, calls: int, first: int) -> int:
    """Make the calls in processes that may crash."""
    print(f"seed {seed}, {calls} calls", flush=True)
    tally, deaths, end, started = Tally(), 0, first + calls, time.monotonic()
    while first < end and deaths < MOST_DEATHS:
        if not (problem := watch(seed, first, end, tally)):
            break
        deaths += 1
        again = f"python tests/sanitized/fuzz.py {seed} 1 {tally.last}"
        print(f"DEATH in call {tally.last}, {tally.what}: {problem}; again: {again}", flush=True)
        first = tally.last + 1
    took = f"{time.monotonic() - started:.0f} s"
    print(f"seed {seed}: {dict(tally.counts)}, {deaths} deaths, {len(tally.bad)} kinds of other defects, {took}")
    return int(deaths > 0 or bool(tally.bad))


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(*map(int, sys.argv[2:5]))
    else:
        numbers = list(map(int, sys.argv[1:]))
        seed, calls, first = (*numbers, *(random.randrange(2**31), 3000, 0)[len(numbers) :])
        sys.exit(main(seed, calls, first))
