"""Damage an artifact folder in N ways with the hashes it had, and in N with hashes that agree again; load each and ask.

    python tests/reliability/damage_artifact.py --count 1000 --seed 0            # and --seed 1 beside it: about an hour
    python tests/reliability/damage_artifact.py --case 17 --rehash --keep out/   # one folder, to look at

Every folder is loaded in a separate process, forked from one that has everything imported, so that crashes and hangs
are detected. Outcomes: refused (an ArtifactError with what, where, do) / same answer / changed answer / another model /
bare traceback / crash / slow (more than 5 s of CPU time). All but the first, second and fourth are failures.

Hashes are not signatures: anyone who can write a folder can write another model into it. Damage counts as `another
model`, and may answer differently, if it is in the values of a tensor, in the nodes of a graph, or in the settings of
the processor or of generation. Everything else is refused or changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from damage import DAMAGES, Damage
from PIL import Image

import qpcompile
from qpcompile.errors import ArtifactError, QPCompileError
from qpcompile.progress import track
from qpcompile.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
BED = ROOT / "tests" / "testbed" / "llava"
SETTINGS = [
    *("quantize.transform=hadamard", "quantize.weights.solver=rtn", "quantize.smooth=null", "quantize.center=null"),
    *("quantize.activations.clip_search=false", "tokens.candidate_layers=[1, 3]"),
]
FINE = ("refused", "same answer", "another model", "refused at the answer")
MOST_SECONDS, MOST_WAIT = 5.0, 60.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one folder."""

    what: str
    text: str
    seconds: float


def main() -> int:
    """Run the cases of the command line; returns 1 if one of them is a failure."""
    parser = argparse.ArgumentParser(description="Damage an artifact folder and load it.")
    parser.add_argument("--count", type=int, default=2000, help="folders with true hashes, and as many with new ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifact", type=Path, help="the folder to damage; without it the LLaVA testbed is compiled")
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--rehash", action="store_true", help="folders with recomputed hashes alone")
    parser.add_argument("--keep", type=Path, help="with --case: leave the damaged folder there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        work = Path(name)
        artifact = asked.artifact or compiled(work / "artifact")
        inputs = question(artifact)
        answer = outcome(artifact, inputs, None)
        assert answer.what == "answer", answer
        if asked.case is not None:
            found = one_case(
                asked.seed, asked.case, asked.rehash, artifact, asked.keep or work / "case", inputs, answer
            )
            print(f"{found[0].name}: {found[1].what} ({found[1].seconds:.1f} s)\n{found[1].text}")
            return 0
        kinds = (True,) if asked.rehash else (False, True)
        said = " and ".join(map(kind_of, kinds))
        print(f"seed {asked.seed}, {asked.count} folders with {said} hashes each", flush=True)
        return sum(all_cases(asked.seed, asked.count, rehash, artifact, work, inputs, answer) for rehash in kinds)


def kind_of(rehash: bool) -> str:
    """What the manifest's hashes are."""
    return "recomputed" if rehash else "true"


def compiled(folder: Path) -> Path:
    """The artifact of a testbed, quantized and pruned."""
    qpcompile.compile(BED, Recipe.load("quota-30").with_overrides(SETTINGS)).save_pretrained(folder)
    return folder


def question(folder: Path) -> dict[str, Any]:
    """Inputs for one answer."""
    processor: Any = qpcompile.load(folder).processor
    picture = Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    return dict(
        processor(images=[picture], text=["<s><|user|><image> what is this?<|assistant|>"], return_tensors="pt")
    )


def all_cases(
    seed: int, count: int, rehash: bool, artifact: Path, work: Path, inputs: dict[str, Any], answer: Outcome
) -> int:
    """Print a table of kinds of damage and outcomes; returns 1 if there is a failure."""
    table: Counter[tuple[str, str]] = Counter()
    failures, slowest, start = [], 0.0, time.monotonic()
    with track(f"{kind_of(rehash)} hashes", count) as step:
        for case in range(count):
            damage, found = one_case(seed, case, rehash, artifact, work / "case", inputs, answer)
            table[damage.name, found.what] += 1
            slowest = max(slowest, found.seconds)
            if found.what not in FINE:
                failures.append(f"case {case} {'--rehash ' if rehash else ''}{damage.name}: {found.what}: {found.text}")
            step()
    print(f"\n{kind_of(rehash)} hashes, {count} folders, {time.monotonic() - start:.0f} s, ", end="")
    print(f"slowest {slowest:.1f} s of processor time")
    outcomes = sorted({what for _, what in table}, key=lambda what: (what not in FINE, what))
    print(f"| damage | {' | '.join(outcomes)} |\n| --- |{' ---: |' * len(outcomes)}")
    for name in sorted({name for name, _ in table}):
        print(f"| {name} | {' | '.join(str(table[name, what]) for what in outcomes)} |")
    totals = [sum(number for (_, what), number in table.items() if what == each) for each in outcomes]
    print(f"| all | {' | '.join(map(str, totals))} |", flush=True)
    for line in failures:
        print(line, flush=True)
    return int(bool(failures))


def one_case(
    seed: int, case: int, rehash: bool, artifact: Path, folder: Path, inputs: dict[str, Any], answer: Outcome
) -> tuple[Damage, Outcome]:
    """Damage a copy of the artifact as determined by this number, and load it."""
    choice = random.Random(f"{seed} {case} {rehash}")
    damage = choice.choice(DAMAGES)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(artifact, folder, copy_function=linked)
    other = damage.run(folder, choice, rehash)
    found = outcome(folder, inputs, answer)
    if found.what == "changed answer" and other:
        found = Outcome("another model", "", found.seconds)
    return damage, found


def linked(source: str, target: str) -> None:
    """A hard link to a file if on the same disk; damaging a file replaces it by another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def outcome(folder: Path, inputs: dict[str, Any], answer: Outcome | None) -> Outcome:
    """Load a folder and ask it in a separate process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.write(writer, json.dumps(load_and_ask(folder, inputs)).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, MOST_WAIT)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status) == signal.SIGKILL
        return Outcome("slow" if killed else "crash", f"signal {os.WTERMSIG(status)}", usage.ru_utime + usage.ru_stime)
    if not text:
        return Outcome("crash", f"exit status {status}", usage.ru_utime + usage.ru_stime)
    what, said, seconds = json.loads(text)
    if seconds > MOST_SECONDS:
        what = "slow"
    elif what == "answer" and answer is not None:
        what = "same answer" if said == answer.text else "changed answer"
    return Outcome(what, said, seconds)


def load_and_ask(folder: Path, inputs: dict[str, Any]) -> tuple[str, str, float]:
    """(what happened, the answer or the error, CPU seconds of loading)."""
    start = time.process_time()
    try:
        model = qpcompile.load(folder)
    except ArtifactError as error:
        whole = bool(error.what and error.where and error.do) and len(str(error)) < 4000
        return "refused" if whole else "bare traceback", str(error)[:500], time.process_time() - start
    except BaseException:  # noqa: BLE001 - unexpected exceptions are what this script looks for
        return "bare traceback", traceback.format_exc()[-1500:], time.process_time() - start
    seconds = time.process_time() - start
    try:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    except QPCompileError as error:
        return "refused at the answer", str(error)[:500], seconds
    except BaseException:  # noqa: BLE001
        return "bare traceback at the answer", traceback.format_exc()[-1500:], seconds
    return "answer", str(tokens.tolist()), seconds


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
