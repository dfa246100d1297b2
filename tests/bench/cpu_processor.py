"""The processor of a run of the CPU benchmark: its name, its kind, and how fast a core reads memory.

python tests/bench/cpu_processor.py THREADS     the measured read bandwidth, GB/s
"""

import platform
import subprocess
import sys
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path

# Kinds by the flag that tells them, the best first; a results page is named after its kind.
KINDS = {"amx_int8": "amx", "avx512_vnni": "avx512-vnni", "avx512f": "avx512", "avx2": "avx2"}
TELLING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# What is read once to measure: 1 GB, far more than caches hold.
READ, TIMES = 2**30, 6


@cache
def fields() -> dict[str, str]:
    """Linux's description of the last core."""
    text = Path("/proc/cpuinfo").read_text("utf-8")
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in found.items()}


def flags() -> Collection[str]:
    """The processor's instruction sets, as Linux names them."""
    found = fields()
    return found.get("flags", found.get("Features", "")).split()


def processor() -> str:
    """The processor's name and its instructions for low-precision types."""
    name = fields().get("model name", platform.machine())
    return f"{name} ({', '.join(flag for flag in TELLING if flag in flags())})"


def kind(instruction_set: str | None = None) -> str:
    """The name of the results page: the processor's kind, and what our operators were restricted to."""
    best = next((name for flag, name in KINDS.items() if flag in flags()), platform.machine())
    return f"{instruction_set}-on-{best}" if instruction_set else best


def bandwidth(cores: Collection[int]) -> float:
    """GB/s (10^9 bytes) that these cores read, in a process of its own: the best of several passes."""
    listed = ",".join(str(core) for core in cores)
    command = ["taskset", "-c", listed, sys.executable, __file__, str(len(cores))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(threads: int) -> float:
    """GB/s of the fastest of several maxima over 1 GB of float32."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(READ // 4)
    # A thread's own CPU time does not count other programs; several threads are measured by the wall clock.
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = []
    for _ in range(TIMES):
        start = clock()
        numbers.amax()
        seconds.append(clock() - start)
    return READ / min(seconds) / 1e9


if __name__ == "__main__":
    print(measure(int(sys.argv[1])))
