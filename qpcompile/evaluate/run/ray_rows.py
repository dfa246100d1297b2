"""Rows as Ray tasks. Needs the extra `ray`.

Ray decides which worker computes which row, by what a row needs. A worker loads the model itself, from the same path,
and refuses to compute if its code, model, data or versions differ from those of the command. It stores nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import torch
from ray import exceptions

from qpcompile.errors import ArtifactError, InputError, QPCompileError, WorkerError
from qpcompile.evaluate.run.evaluation import Exam, source_digest
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, Outcome, T, Walk, computed
from qpcompile.evaluate.run.rows import Row
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.placement import compute_device

LOCAL = "local"
MOST_TRIES = 3
GIB = 2**30
# Of a local Ray's store of shared objects: rows are a few hundred kB.
STORE_BYTES = 256 * 2**20
# What a row takes beside weights, and copies of them: the model's own, and those of a compile.
BASE_BYTES, WEIGHT_COPIES = GIB, 3
# A worker or its machine is gone, or Ray ended it because memory ran out.
LOST = (
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
)


@dataclass(frozen=True)
class Needs:
    """What one row needs of a machine. cpus: also its threads."""

    cpus: int
    gpus: int
    memory_bytes: int

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}

    @classmethod
    def of(cls, resources: dict[str, float]) -> Needs:
        """The inverse of `resources`."""
        return cls(*(int(resources.get(name, 0)) for name in ("CPU", "GPU", "memory")))

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}, {self.memory_bytes / GIB:.1f} GiB"


@dataclass(frozen=True)
class Station:
    """An examiner as it is sent to workers: paths are absolute, nothing is loaded."""

    source: str
    exam: Exam
    calibration: Path | None
    device: str | None

    @classmethod
    def of(cls, examiner: Examiner) -> Station:
        """What a worker needs to be such an examiner."""
        questions = tuple(replace(each, image=each.image and each.image.absolute()) for each in examiner.exam.questions)
        source = Path(examiner.source)
        return cls(
            str(source.absolute()) if source.is_dir() else examiner.source,
            replace(examiner.exam, questions=questions),
            None if examiner.calibration is None else examiner.calibration.absolute(),
            None if examiner.device is None else str(examiner.device),
        )


@contextmanager
def connected(address: str, say: Callable[[str], None]) -> Iterator[None]:
    """Connect to the Ray at an address, or start one on this machine for `local`; leave it at the end.

    Raises WorkerError if there is none.
    """
    if not address.strip():
        # Ray would start one of its own, which reports how it is used.
        raise WorkerError("the address of Ray is empty", where="--ray", do="name a cluster's address, or `local`")
    if address == LOCAL:
        # Ray reports how it is used to its makers unless it is told not to.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        options = {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except Exception as error:
        raise WorkerError(
            f"no Ray could be reached: {(str(error) or type(error).__name__).splitlines()[0]}",
            where=f"--ray {address}",
            do="name the address of a running cluster (ray start --head prints it), or `local`",
        ) from error
    try:
        found = ray.cluster_resources()
        say(f"Ray: machines {len(_nodes())}, CPUs {found.get('CPU', 0):g}, GPUs {found.get('GPU', 0):g}")
        yield
    finally:
        ray.shutdown()


def row_memory(source: str) -> int:
    """An estimate of the bytes that a row of a model takes. Raises InputError for a name on the hub: give it then."""
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(
            f"how much memory a row takes is estimated from a model's folder, and {source} is none",
            where="--row-memory",
            do="name the memory of a row, about four times the size of the weights in GiB, or download the model first",
        )
    return BASE_BYTES + WEIGHT_COPIES * sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class OnRay:
    """A runner (see row_runner.py) whose rows are Ray tasks. Ray must be connected.

    Args:
        needs: of each row.
        say: told of workers that are lost.
        may_grow: whether machines may join later: rows that fit nowhere wait then, and are refused otherwise.
    """

    def __init__(self, needs: Needs, say: Callable[[str], None], may_grow: bool) -> None:
        self._needs, self._say = needs, say
        self._check_room(may_grow)
        self._source = source_digest()
        self._stations: dict[Examiner, Any] = {}
        # Lost rows are asked for again here, where it is counted and told.
        remote = ray.remote(compute_row)
        self._task = remote.options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory_bytes, max_retries=0, name="qpcompile row"
        )

    def run(self, walks: Iterable[Walk[T]]) -> list[T]:
        """See RowRunner. Raises WorkerError at the end if rows were lost too often; the others are stored by then."""
        started = list(walks)
        results: dict[int, T] = {}
        flying: dict[Any, tuple[int, Ask, int]] = {}
        lost: list[str] = []

        def advance(number: int, outcome: Outcome | None) -> None:
            walk = started[number]
            try:
                ask = next(walk) if outcome is None else walk.send(outcome)
            except StopIteration as end:
                results[number] = end.value
            else:
                flying[self._sent(ask)] = number, ask, 1

        try:
            for number in range(len(started)):
                advance(number, None)
            while flying:
                (done,), _ = ray.wait(list(flying))
                number, ask, tries = flying.pop(done)
                try:
                    outcome = _received(done, ask)
                except LOST as error:
                    told = f"{ask.name}: its worker was lost ({type(error).__name__})"
                    if tries < MOST_TRIES:
                        self._say(f"{told}; asked for again, attempt {tries + 1} of {MOST_TRIES}")
                        flying[self._sent(ask)] = number, ask, tries + 1
                    else:
                        self._say(f"{told}; given up after {MOST_TRIES} attempts")
                        lost.append(ask.name)
                else:
                    advance(number, outcome)
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)
        if lost:
            raise WorkerError(
                f"{len(lost)} rows were lost with their workers, {MOST_TRIES} times each; the others are stored",
                where="; ".join(lost),
                do="give rows more memory (--row-memory) if it ran out, see Ray's log for the reason, and run again",
            )
        return [results[number] for number in range(len(started))]

    def _sent(self, ask: Ask) -> Any:
        if ask.examiner not in self._stations:
            self._stations[ask.examiner] = ray.put(Station.of(ask.examiner))
        station = self._stations[ask.examiner]
        return self._task.remote(station, ask.id, ask.name, ask.recipe, self._source, self._needs.cpus)

    def _check_room(self, may_grow: bool) -> None:
        """Say, or refuse, that no machine has what a row needs: Ray would wait for one without a word."""
        if any(all(node.get(name, 0) >= least for name, least in self._needs.resources.items()) for node in _nodes()):
            return
        found = "; ".join(str(Needs.of(node)) for node in _nodes())
        told = f"a row needs {self._needs}, and no machine of this Ray has that ({found})"
        if not may_grow:
            raise WorkerError(
                told, where="--row-cpus, --row-memory, --device", do="ask for less, or name a cluster with larger ones"
            )
        self._say(f"{told}: rows wait until one joins")


def _nodes() -> list[dict[str, float]]:
    """The resources of each machine."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _received(reference: Any, ask: Ask) -> Outcome:
    """What a task returned, under the names of the command. An error of ours is raised as it is."""
    try:
        outcome: Any = ray.get(reference)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, QPCompileError):
            raise error.cause from None
        raise
    except LOST:
        raise
    except exceptions.RayError as error:
        raise WorkerError(
            f"Ray could not run a row: {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}",
            where=ask.name,
            do="see `ray status` and Ray's log, and run again; rows that came are kept",
        ) from error
    if isinstance(outcome, Row):
        return outcome.model_copy(update={"model": ask.examiner.source})
    return outcome


def compute_row(station: Station, id: str, name: str, recipe: Recipe | None, source: str, threads: int) -> Outcome:
    """Compute one row in a worker. Refusals of the recipe are returned, everything else is raised.

    Args:
        station: the model and the questions.
        id: of the row, where it was asked for.
        name: of the row.
        recipe: None for full precision.
        source: hash of the code that asked.
        threads: of torch and the kernels; sums depend on it.
    """
    own = source_digest()
    if own != source:
        raise ArtifactError(
            f"the worker has other code ({own}) than the command ({source}), and one table holds numbers of one "
            "version only",
            where=_here(),
            do="install the same version on every machine",
        )
    torch.set_num_threads(threads)
    examiner = _examiner(station)
    if (found := examiner.id(recipe)) != id:
        raise ArtifactError(
            f"the worker finds another model, other data or other versions: its row is {found}, asked for was {id}",
            where=f"{_here()}: {station.source}, {station.exam.data}",
            do="put the same files at the same path, and the same versions of torch and transformers, on every machine",
        )
    return computed(examiner, name, recipe)


@lru_cache(maxsize=1)
def _examiner(station: Station) -> Examiner:
    """Kept for the worker's next row, which shares the loaded model and what was measured."""
    if station.source.startswith(os.sep) and not Path(station.source).is_dir():
        raise ArtifactError(
            "the worker has no such folder", where=f"{_here()}: {station.source}", do="put models on shared storage"
        )
    device = None if station.device is None else compute_device(station.device)
    return Examiner(station.source, station.exam, station.calibration, None, device)


def _here() -> str:
    return f"machine {ray.util.get_node_ip_address()}"
