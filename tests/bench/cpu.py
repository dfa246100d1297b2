"""Whole answers on one CPU core, compared with other runtimes: python tests/bench/cpu.py [--shapes A B]

Every peer is a separate process that loads its model once; then all answer in turns, so that other load affects all of
them. What they load is built on first use in build/bench/, and rebuilt when its sources have changed. Writes
docs/results/cpu.csv and cpu.md. A peer that cannot run gets a line with the reason.

    python tests/bench/cpu.py --install-openvino     once: OpenVINO's environment in build/bench/openvino
    python tests/bench/cpu.py                        all peers on A, B and the testbed
    python tests/bench/cpu.py --shapes B --peers ours OpenVINO --rounds 5
"""

import argparse
import json
import os
import platform
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
from cpu_peers import BUILD, HERE, MAKES, OPENVINO, OPENVINO_PACKAGES, PEERS, ROOT, Make, Peer, interpreter
from cpu_shapes import SHAPES
from cpu_table import BASELINE, Row, Target, as_csv, as_markdown, busyness, targets_as_markdown

# Time limits in seconds for building a folder, loading it and one answer.
MAKE_LIMIT, LOAD_LIMIT, ANSWER_LIMIT = 3600, 600, 600
# Memory to keep free when workers are started together, in bytes.
RESERVE = 2 * 10**9


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
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core all peers run on")
    parser.add_argument("--stale", action="store_true", help="take what was made before the code changed")
    parser.add_argument("--build", type=Path, default=BUILD, help="where models and logs go")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "cpu", help="the results, less .csv, .md"
    )
    parser.add_argument("--install-openvino", action="store_true", help="make OpenVINO's environment and stop")
    options = parser.parse_args(arguments)
    if options.install_openvino:
        return install_openvino()
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    rows: list[Row] = []
    for shape in options.shapes:
        rows += measure(shape, chosen(options.peers), options, run)
    merged = merge(rows, options.build / "rows.json")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".csv").write_text(as_csv(merged), "utf-8")
    options.out.with_suffix(".md").write_text(report(merged, options), "utf-8")
    print(as_markdown(merged))
    print(targets_as_markdown(merged, TARGETS))
    return 0


def chosen(wanted: Sequence[str] | None) -> list[Peer]:
    """The named peers and the baseline; without names, all that run by default."""
    if wanted is None:
        return [peer for peer in PEERS.values() if not peer.asked]
    return [peer for peer in PEERS.values() if peer.name == BASELINE or peer.name.startswith(tuple(wanted))]


def measure(shape: str, peers: Sequence[Peer], options: argparse.Namespace, run: str) -> list[Row]:
    """Rows of all peers on one shape. If memory does not hold all at once, each group includes the baseline."""
    folder: Path = options.build / shape
    failed: dict[str, str] = {}
    unmade: dict[str, PeerError] = {}
    waiting = []
    for peer in peers:
        try:
            prepare(MAKES[peer.folder], shape, folder, options.stale, unmade)
            waiting.append(peer)
        except PeerError as error:
            failed[peer.name] = str(error)
            say(f"{shape}: {peer.name}: {error}")
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
        rows += [
            Row(shape, each.peer.name, name, each.loaded, each.runs, failed.get(each.peer.name, "")) for each in workers
        ]
        group += 1
    measured = {row.peer for row in rows}
    rows += [Row(shape, peer.name, run, note=failed.get(peer.name, "")) for peer in peers if peer.name not in measured]
    return rows


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
            worker = load(peer, shape, folder, options.core, options.new_tokens)
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


def load(peer: Peer, shape: str, folder: Path, core: int, new_tokens: int) -> Worker:
    """Start a peer's process and wait until its model is loaded."""
    command = [
        str(interpreter(peer.python)),
        str(HERE / peer.worker),
        str(folder / peer.folder / peer.part),
        shape,
        str(new_tokens),
        *peer.arguments,
    ]
    path = log(folder, peer.name)
    with path.open("w", encoding="utf-8") as text:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=text,
            env=environment(),
            text=True,
        )
    # Threads that it starts inherit the affinity.
    os.sched_setaffinity(process.pid, {core})
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
                found = tell(worker, {"prompt": number}, ANSWER_LIMIT)
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


def install_openvino() -> int:
    """A separate environment: optimum-intel requires transformers 4.57."""
    folder = BUILD / OPENVINO
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *OPENVINO_PACKAGES]
    return subprocess.run(command, check=False).returncode


def environment() -> dict[str, str]:
    """One thread, and this folder's modules."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}


def log(folder: Path, name: str) -> Path:
    """The file that receives a process's stderr."""
    return folder / f"{name.replace(' ', '-')}.log"


def last_line(path: Path) -> str:
    """The last line of a log: the message of an exception."""
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The Markdown page."""
    ran = [row for row in rows if row.runs]
    versions = sorted({f"{name} {version}" for row in ran for name, version in row.loaded["versions"].items()})
    settings = [f"- {row.shape}, {row.peer}: {row.loaded['settings']}" for row in ran if row.loaded.get("settings")]
    busy = busyness(ran)
    lines = [
        "# Whole answers on one CPU core",
        "",
        f"Written by `make bench` (tests/bench/cpu.py). One picture, batch 1, greedy, {options.new_tokens} new tokens, "
        "random weights",
        "(tests/bench/cpu_models.py), one thread on one core. Each peer is a process; all answer in turns. Medians, in",
        "brackets minimum and maximum. The first token includes tower, projector, prompt and its logits; OpenVINO",
        "GenAI also resizes and normalises the picture. ORT: graphs exported by this package without quantization,",
        "int4 by onnxruntime's own tool; except `caches in place`, which uses onnxruntime's own attention, they copy",
        "their caches on each step and have no fused attention.",
        f"`peak MB`: resident memory since the process began. Baseline: {BASELINE}, in the same run.",
        "",
        "Times are CPU time of the process; wall-clock times were "
        f"{busy:.2f} times as long, since the machine was shared."
        if busy
        else "",
        "",
        f"- {processor()}, {platform.system()}, Python {platform.python_version()}",
        f"- {', '.join(versions)}",
        *settings,
        "",
    ]
    return "\n".join(lines) + "\n" + as_markdown(rows) + "\n## Targets\n\n" + targets_as_markdown(rows, TARGETS)


def processor() -> str:
    """The processor's name and its instructions for low-precision types."""
    text = Path("/proc/cpuinfo").read_text("utf-8")
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = {name.strip(): value for name, value in fields.items()}
    telling = ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    known = [flag for flag in telling if flag in flags["flags"].split()]
    return f"{flags['model name'].strip()} ({', '.join(known)})"


GENAI, GENAI_PRUNED = "OpenVINO GenAI int4", "OpenVINO GenAI int4, CDPruner 30 %"
ORT_INT4 = "ORT int4, caches in place"
TARGETS = [
    Target(shape, measured, ours, other, most)
    for shape in ("A", "B")
    for ours in ("ours quota-30, bf16", "ours quota-30, ONNX fast")
    for measured, other, most in (
        # GenAI ignores pruning for LLaVA, so its unpruned answer is the comparison.
        ("first_ms", GENAI if shape == "A" else GENAI_PRUNED, 0.6),
        ("decode_ms", ORT_INT4, 1.0),
        ("decode_ms", BASELINE, 0.25),
        ("weights_mb", GENAI, 1.0),
        ("peak_mb", GENAI, 1.2),
    )
]


if __name__ == "__main__":
    sys.exit(main())
