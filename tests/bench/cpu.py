"""Whole answers on one CPU core, compared with other runtimes: python tests/bench/cpu.py [--shapes A B]

Every peer is a separate process that loads its model once; then all answer in turns, so that other load affects all of
them. What they load is built on first use in build/bench/, and rebuilt when its sources have changed. Writes
docs/results/cpu-KIND.csv and .md, where KIND is the processor's best instruction set, after every shape. A peer that
cannot run gets a line with the reason. A run that was interrupted goes on with `--resume`.

    python tests/bench/cpu.py --install-openvino     once: OpenVINO's environment in build/bench/openvino
    python tests/bench/cpu.py --install-llamacpp     once: llama.cpp, compiled in build/bench/llamacpp
    python tests/bench/cpu.py --prepare              only build what is measured
    python tests/bench/cpu.py                        all peers on A, B and the testbed
    python tests/bench/cpu.py --shapes B --peers ours OpenVINO --rounds 5
    python tests/bench/cpu.py --instruction-set avx2 our operators as on a processor without AVX-512
"""

import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from cpu_install import install_llamacpp, install_openvino
from cpu_page import page
from cpu_peers import BUILD, HERE, MAKES, PEERS, ROOT, Make, Peer, interpreter
from cpu_processor import bandwidth, flags, kind
from cpu_shapes import SHAPES
from cpu_table import BASELINE, Row, as_csv, as_markdown

# Time limits in seconds for building a folder, loading it and one answer.
MAKE_LIMIT, LOAD_LIMIT, ANSWER_LIMIT = 3600, 600, 600
# Memory to keep free when workers are started together, in bytes.
RESERVE = 2 * 10**9
# The worker whose operators in C can be restricted.
OURS = "cpu_ours.py"
# Per instruction set, the switches of torch and of oneDNN (also OpenVINO's); onnxruntime and llama.cpp have none.
RESTRICTED = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
INSTALL = {"openvino": install_openvino, "llamacpp": install_llamacpp}


class PeerError(Exception):
    """A peer does not run here; the text gives the reason."""


@dataclass
class Worker:
    """A peer's process and its messages so far."""

    peer: Peer
    process: subprocess.Popen[str]
    loaded: dict[str, Any]
    runs: list[dict[str, float]]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B", "testbed"])
    parser.add_argument("--peers", nargs="+", help="only peers whose names begin like one of these, and the baseline")
    parser.add_argument("--rounds", type=int, default=3, help="answers of each peer that count; one more comes first")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=sorted(os.sched_getaffinity(0))[::-1],
        help="the cores peers run on: the first, with two threads the second too",
    )
    parser.add_argument("--instruction-set", choices=list(RESTRICTED), help="the best that our operators in C use")
    parser.add_argument("--stale", action="store_true", help="take what was made before the code changed")
    parser.add_argument("--prepare", action="store_true", help="build what peers load and stop")
    parser.add_argument("--resume", action="store_true", help="leave out shapes whose chosen peers have rows")
    parser.add_argument("--build", type=Path, default=BUILD, help="where models and logs go")
    parser.add_argument("--out", type=Path, help="the results, less .csv, .md; docs/results/cpu-KIND by default")
    for name in INSTALL:
        parser.add_argument(f"--install-{name}", action="store_true", help="make this peer's environment and stop")
    options = parser.parse_args(arguments)
    wanted = [name for name in INSTALL if getattr(options, f"install_{name}")]
    for name in wanted:
        INSTALL[name]()
    if wanted:
        return 0
    named = kind(options.instruction_set)
    store, out = options.build / f"rows-{named}.json", options.out or ROOT / "docs" / "results" / f"cpu-{named}"
    peers = chosen(options.peers)
    for shape in options.shapes:
        if options.prepare:
            prepare_all(peers, shape, options, {})
        elif not (options.resume and {peer.name for peer in peers} <= measured(store, shape)):
            run = time.strftime("%Y-%m-%dT%H:%M:%S")
            merged = merge(measure(shape, peers, options, run), store)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".csv").write_text(as_csv(merged), "utf-8")
            out.with_suffix(".md").write_text(page(merged, named, options.instruction_set, options.new_tokens), "utf-8")
            print(as_markdown([row for row in merged if row.shape == shape]))
    return 0


def chosen(wanted: Sequence[str] | None) -> list[Peer]:
    """The named peers and the baseline; without names, all that run by default on this processor."""
    if wanted is None:
        return [peer for peer in PEERS.values() if not peer.asked and (not peer.needs or peer.needs in flags())]
    return [peer for peer in PEERS.values() if peer.name == BASELINE or peer.name.startswith(tuple(wanted))]


def measure(shape: str, peers: Sequence[Peer], options: argparse.Namespace, run: str) -> list[Row]:
    """Rows of all peers on one shape. If memory does not hold all at once, each group includes the baseline."""
    folder: Path = options.build / shape
    failed: dict[str, str] = {}
    waiting = prepare_all(peers, shape, options, failed)
    # Before and after the answers, since other programs use the memory too.
    speeds = {count: bandwidth(options.cores[:count]) for count in {peer.threads for peer in waiting}}
    rows: list[Row] = []
    group = 0
    while waiting:
        name = run if not group else f"{run} group {group + 1}"
        baseline = [] if not group else [peer for peer in peers if peer.name == BASELINE]
        workers, waiting = start(baseline, waiting, shape, folder, options, failed)
        try:
            ask_in_turns(workers, shape, options.rounds, failed)
        finally:
            for worker in workers:
                worker.close()
        speeds |= {count: max(found, bandwidth(options.cores[:count])) for count, found in speeds.items()}
        for each in workers:
            peer = each.peer
            known = {**each.loaded, "threads": peer.threads, "batch": peer.batch, "read_gbps": speeds[peer.threads]}
            rows.append(Row(shape, peer.name, name, known, each.runs, failed.get(peer.name, "")))
        group += 1
    measured = {row.peer for row in rows}
    rows += [Row(shape, peer.name, run, note=failed.get(peer.name, "")) for peer in peers if peer.name not in measured]
    return rows


def prepare_all(peers: Sequence[Peer], shape: str, options: argparse.Namespace, failed: dict[str, str]) -> list[Peer]:
    """Build what the peers load; those that can be measured. The others get their reasons in `failed`."""
    unmade: dict[str, PeerError] = {}
    ready = []
    for peer in peers:
        try:
            prepare(MAKES[peer.folder], shape, options.build / shape, options.stale, unmade)
            ready.append(peer)
        except PeerError as error:
            failed[peer.name] = str(error)
            say(f"{shape}: {peer.name}: {error}")
    return ready


def prepare(make: Make, shape: str, folder: Path, stale: bool, unmade: dict[str, PeerError]) -> None:
    """Build a folder that is missing or whose sources have changed; what failed once (`unmade`) is not tried again."""
    if make.folder in unmade:
        raise unmade[make.folder]
    python = interpreter(make.python)
    if not python.exists():
        raise PeerError(f"not installed: python tests/bench/cpu.py --install-{make.python}")
    target, key = folder / make.folder, folder / f"{make.folder}.key"
    if target.exists() and key.exists() and (stale or key.read_text("utf-8") == make.key()):
        return
    if make.source:
        prepare(MAKES[make.source], shape, folder, stale, unmade)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (target, folder / f"{make.folder}.unfinished"):
        shutil.rmtree(path, ignore_errors=True)
    say(f"{shape}: making {make.folder}")
    sources = [str(folder / make.source)] if make.source else []
    command = [str(python), str(HERE / make.script), *make.arguments, shape, str(target), *sources]
    wanted = make.key()
    with log(folder, make.folder).open("w", encoding="utf-8") as text:
        done = subprocess.run(command, stdout=text, stderr=text, env=environment(), timeout=MAKE_LIMIT, check=False)
    if done.returncode or not target.exists():
        unmade[make.folder] = PeerError(f"making {make.folder} failed: {last_line(log(folder, make.folder))}")
        raise unmade[make.folder]
    key.write_text(wanted, "utf-8")


def start(
    baseline: Sequence[Peer],
    waiting: Sequence[Peer],
    shape: str,
    folder: Path,
    options: argparse.Namespace,
    failed: dict[str, str],
) -> tuple[list[Worker], list[Peer]]:
    """Workers for the baseline and as many others as fit in memory, and the peers that must wait; at least one runs."""
    workers: list[Worker] = []
    queue = [*baseline, *waiting]
    while queue:
        peer = queue[0]
        try:
            worker = load(peer, shape, folder, options.cores, options.new_tokens, options.instruction_set)
        except PeerError as error:
            failed[peer.name] = str(error)
            say(f"{shape}: {peer.name}: {error}")
            queue.pop(0)
            continue
        if len(workers) > len(baseline) and psutil.virtual_memory().available < RESERVE:
            worker.close()
            break
        workers.append(worker)
        say(f"{shape}: {peer.name} is loaded, {worker.loaded['resident_mb']:.0f} MB")
        queue.pop(0)
    return workers, queue


def load(
    peer: Peer, shape: str, folder: Path, cores: Sequence[int], new_tokens: int, instruction_set: str | None = None
) -> Worker:
    """Start a peer's process and wait until its model is loaded."""
    command = [
        str(interpreter(peer.python)),
        str(HERE / peer.worker),
        str(folder / peer.folder / peer.part),
        shape,
        str(new_tokens),
        str(peer.threads),
        *peer.arguments,
        *([instruction_set] if instruction_set and peer.worker == OURS else []),
    ]
    path = log(folder, peer.name)
    with path.open("w", encoding="utf-8") as text:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=text,
            env=environment(peer.threads, instruction_set),
            text=True,
        )
    # Threads that it starts inherit the affinity.
    os.sched_setaffinity(process.pid, cores[: peer.threads])
    worker = Worker(peer, process, {}, [])
    worker.loaded = hear(worker, LOAD_LIMIT, path)
    return worker


def ask_in_turns(workers: Sequence[Worker], shape: str, rounds: int, failed: dict[str, str]) -> None:
    """One answer of every peer in each round; round 0 is the warm-up. A peer that fails is not asked again."""
    for number in range(rounds + 1):
        for worker in workers:
            if worker.peer.name in failed:
                continue
            try:
                found = tell(worker, {"prompt": number, "batch": worker.peer.batch}, ANSWER_LIMIT)
            except PeerError as error:
                failed[worker.peer.name] = str(error)
                say(f"{shape}: {worker.peer.name}: {error}")
                continue
            if number:
                worker.runs.append(found)
            times = f"{found['first_core_ms']:.0f} ms, then {found.get('decode_core_ms', 0):.1f} ms/token"
            say(f"{shape}: round {number}: {worker.peer.name}: {times}")


def tell(worker: Worker, question: dict[str, Any], limit: float) -> dict[str, Any]:
    """Send a question and receive the answer."""
    stdin: IO[str] | None = worker.process.stdin
    assert stdin is not None
    try:
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
    except BrokenPipeError as error:
        raise PeerError("its process has ended") from error
    return hear(worker, limit)


def hear(worker: Worker, limit: float, path: Path | None = None) -> dict[str, Any]:
    """The next message of a worker; a failure that it reports, a timeout and its exit are errors."""
    stdout: IO[str] | None = worker.process.stdout
    assert stdout is not None
    ready, _, _ = select.select([stdout], [], [], limit)
    line = stdout.readline() if ready else ""
    if not line:
        worker.close()
        reason = "its process has ended" if ready else f"no answer within {limit:.0f} s"
        raise PeerError(f"{reason}: {last_line(path)}" if path else reason)
    said: dict[str, Any] = json.loads(line)
    if "failed" in said:
        worker.close()
        # Without the path where the library was built.
        raise PeerError(said["failed"].split(" at /")[0])
    return said


def merge(rows: Sequence[Row], store: Path) -> list[Row]:
    """These rows and the rows of earlier runs that they do not replace, in the order of shapes and peers."""
    found = {}
    if store.exists():
        found = {(each["shape"], each["peer"]): Row(**each) for each in json.loads(store.read_text("utf-8"))}
    found |= {(row.shape, row.peer): row for row in rows}
    order = [(shape, peer) for shape in SHAPES for peer in PEERS]
    merged = [found[key] for key in order if key in found]
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps([row.to_dict() for row in merged], indent=1), "utf-8")
    return merged


def measured(store: Path, shape: str) -> set[str]:
    """The peers with a row of this shape."""
    found = json.loads(store.read_text("utf-8")) if store.exists() else []
    return {each["peer"] for each in found if each["shape"] == shape}


def environment(threads: int = 1, instruction_set: str | None = None) -> dict[str, str]:
    """A number of threads, this folder's modules, and what torch and oneDNN may use."""
    limits = RESTRICTED[instruction_set] if instruction_set else {}
    paths = os.pathsep.join([str(HERE), str(ROOT)])
    return {**os.environ, **limits, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}


def log(folder: Path, name: str) -> Path:
    """The file that receives a process's stderr."""
    return folder / f"{name.replace(' ', '-')}.log"


def last_line(path: Path) -> str:
    """The message of the exception at the end of a log, or its last line."""
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return [*lines, *raised][-1][:300] if lines else "it said nothing"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
