"""A stopped compile resumes from its checkpoint, with the same result as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import captured, changed_recipe, fresh

import qpcompile
from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.capture.samples import Samples
from qpcompile.errors import OutputError
from qpcompile.ir import checkpoint as checkpoints
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.pass_list import passes
from qpcompile.passes import quantize_weights
from qpcompile.pipeline import checkpoint_key

COUNT = 3
MEASURED = (
    "quantize.scaling=mbq",
    "quantize.smooth=null",
    "tokens.method=joint",
    "tokens.keep=0.25",
    "tokens.keep_of=mean",
    "tokens.compact_scored_layer=false",
)
TRAINED = ("quantize.transform=flatquant", "quantize.smooth=null", "quantize.training.epochs=1")


class Stopping:
    """Three samples, which can be iterated over repeatedly; the read with this number fails."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.reads = at, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _, cases, _ = captured()
        for sample in (cases["one"], cases["longer"], cases["one"]):
            if self.reads == self.at:
                raise KeyboardInterrupt
            self.reads += 1
            yield sample


def compiled(samples: Stopping, settings: tuple[str, ...], checkpoint: Checkpoint) -> Program:
    """The captured LLaVA through every pass."""
    program = fresh(changed_recipe("w4a4kv4", *settings))
    program.checkpoint = checkpoint
    run_passes(program, passes(samples, COUNT))
    return program


@functools.cache
def uninterrupted(settings: tuple[str, ...]) -> Program:
    """The same without a checkpoint; do not change it."""
    return compiled(Stopping(), settings, Checkpoint())


def tensors(program: Program) -> dict[str, torch.Tensor]:
    """All tensors of all graphs."""
    return {
        f"{name}.{key}": tensor
        for name, graph in program.graphs.items()
        for key, tensor in graph.module.state_dict().items()
    }


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        *((TRAINED, at) for at in (2, 7)),
        pytest.param(TRAINED, 5, marks=pytest.mark.slow),
        *(pytest.param(MEASURED, at, marks=pytest.mark.slow) for at in (2, 5, 7)),
    ],
)
def test_stopped_anywhere_it_ends_the_same(
    settings: tuple[str, ...], at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", -1.0)
    whole = uninterrupted(settings)
    samples = Stopping(at)
    try:
        found = compiled(samples, settings, Checkpoint.open(tmp_path / "progress", "key"))
        assert samples.reads <= at
    except KeyboardInterrupt:
        found = compiled(Stopping(), settings, Checkpoint.open(tmp_path / "progress", "key"))
    assert found.plan == whole.plan
    expected, given = tensors(whole), tensors(found)
    assert list(given) == list(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_what_was_solved_is_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases, _ = captured()
    keys = ("quantize.activations.clip_search=false", "quantize.transform=hadamard")
    recipe = changed_recipe("w4a4kv4", *keys)
    samples = [cases["one"]]
    first = qpcompile.compile(model, recipe, calibration=samples, resume=tmp_path / "progress")

    def again(*_: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr(quantize_weights, "_solve", again)
    second = qpcompile.compile(model, recipe, calibration=samples, resume=tmp_path / "progress")
    assert second.plan == first.plan


def test_a_folder_of_another_compile_is_refused(tmp_path: Path) -> None:
    _, cases, program = captured()
    other = dataclasses.replace(program, recipe=changed_recipe("w4a4kv4"))
    one, longer = (Samples([cases[name]], None, 1, 0) for name in ("one", "longer"))
    Checkpoint.open(tmp_path, checkpoint_key(program, one))
    for key in (checkpoint_key(other, one), checkpoint_key(program, longer), checkpoint_key(program, None)):
        with pytest.raises(OutputError, match="belongs to another model, recipe, calibration or version"):
            Checkpoint.open(tmp_path, key)


def test_nothing_half_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint.open(tmp_path, "key")
    kept.save("a", {"x": torch.ones(2)}, {"n": 1})

    def full(_: Any, path: Path, __: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        kept.save("a", {"x": torch.zeros(2)}, {"n": 2})
    with Checkpoint.open(tmp_path, "key").found("a") as found:
        assert found is not None and found.facts == {"n": 1} and torch.equal(found.tensors["x"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "key"]


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Checkpoint()
    kept.save("a", {}, {})
    with kept.found("a") as found:
        assert found is None
    assert not kept.due()


def kinds(folder: Path) -> list[Path]:
    """One file of every kind: "calibrate", "calibrate projector" and "calibrate prefill layer 2" are three."""
    files = sorted(folder.glob("*.safetensors"))
    return list({re.sub(r"\S*\d\S*", "", path.stem): path for path in files}.values())


def test_deleted_statistics_are_measured_again(tmp_path: Path) -> None:
    def calibrated(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        program = fresh(changed_recipe("w4a4kv4", "quantize.scaling=mbq", "quantize.smooth=null"))
        program.checkpoint = checkpoint
        run_passes(program, passes(Stopping(), COUNT)[:3])
        inputs = program.measured[CALIBRATION].inputs
        return {f"{site} {name}": each for site, found in inputs.items() for name, each in found.tensors().items()}

    whole = calibrated(Checkpoint.open(tmp_path, "key"))
    for path in (tmp_path / f"calibrate {part}.safetensors" for part in ("gradients", "prefill layer 2")):
        path.unlink()
        found = calibrated(Checkpoint.open(tmp_path, "key"))
        assert path.is_file() and list(found) == list(whole), path
        assert all(torch.equal(found[name], whole[name]) for name in whole), path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TRAINED, MEASURED], ids=["trained", "measured"])
def test_what_a_deleted_file_held_is_found_again(settings: tuple[str, ...], tmp_path: Path) -> None:
    whole = uninterrupted(settings)
    compiled(Stopping(), settings, Checkpoint.open(tmp_path, "key"))
    for path in kinds(tmp_path):
        path.unlink()
        found = compiled(Stopping(), settings, Checkpoint.open(tmp_path, "key"))
        assert found.plan == whole.plan and path.is_file(), path
        assert all(torch.equal(each, tensors(whole)[name]) for name, each in tensors(found).items()), path
