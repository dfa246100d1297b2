"""A `--resume` folder returns what was stored there, or is refused by name."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qpcompile.errors import OutputError
from qpcompile.ir.checkpoint import Checkpoint

TENSORS = {"packed": torch.arange(60, dtype=torch.uint8).view(6, 10), "scale": torch.rand(6, 1), "n": torch.tensor(3)}


def kept(folder: Path, key: str = "the key", what: str = "pass site") -> Path:
    """A file of a `--resume` folder."""
    Checkpoint.open(folder, key).save(what, TENSORS, {"error": 0.25})
    return folder / f"{what}.safetensors"


def read(folder: Path, key: str = "the key", what: str = "pass site") -> None:
    """Read it as a pass does."""
    with Checkpoint.open(folder, key).found(what) as found:
        assert found is not None
        found.fits({name: (each.shape, each.dtype) for name, each in TENSORS.items()})
        assert found.read(dict[str, float]) == {"error": 0.25}


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    path = kept(tmp_path)
    read(tmp_path)
    with Checkpoint.open(tmp_path, "the key").found("pass site") as found:
        assert found is not None
        order = found.fits({name: (each.shape, each.dtype) for name, each in TENSORS.items()})
        assert list(order) == list(TENSORS) and all(torch.equal(order[name], TENSORS[name]) for name in TENSORS)
    with Checkpoint.open(tmp_path, "the key").found("another") as found:
        assert found is None
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "key").stat().st_mode)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path)
    data, chance = path.read_bytes(), random.Random(0)
    bits = {*range(64), *chance.sample(range(len(data) * 8), 400)}
    for bit in sorted(bits):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(OutputError, match="cannot be read") as caught:
            read(tmp_path)
        assert caught.value.where == str(path) and "remove this file" in (caught.value.do or ""), bit
    path.write_bytes(data)
    read(tmp_path)


def test_every_flipped_bit_of_the_key_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    data = (tmp_path / "key").read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "key").write_bytes(flipped)
        with pytest.raises(OutputError, match="is damaged") as caught:
            Checkpoint.open(tmp_path, "the key")
        assert caught.value.where == str(tmp_path / "key") and caught.value.do
    (tmp_path / "key").write_bytes(data)
    with pytest.raises(OutputError, match="belongs to another"):
        Checkpoint.open(tmp_path, "another key")


def renamed(folder: Path) -> None:
    os.replace(folder / "pass other.safetensors", folder / "pass site.safetensors")


def of_another_compile(folder: Path) -> None:
    os.replace(kept(folder / ".." / "elsewhere", "another key"), folder / "pass site.safetensors")


def cut(folder: Path) -> None:
    path = folder / "pass site.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / "pass site.safetensors").write_bytes(b"")


def linked(folder: Path) -> None:
    path = folder / "pass site.safetensors"
    path.rename(folder.parent / "moved")
    path.symlink_to(folder.parent / "moved")


def a_folder(folder: Path) -> None:
    (folder / "pass site.safetensors").unlink()
    (folder / "pass site.safetensors").mkdir()


def a_pipe(folder: Path) -> None:
    (folder / "pass site.safetensors").unlink()
    os.mkfifo(folder / "pass site.safetensors")


def a_stranger(folder: Path) -> None:
    (folder / "photo.png").write_bytes(b"")


def without_a_hash(folder: Path) -> None:
    save_file(TENSORS, folder / "pass site.safetensors", {"facts": json.dumps({"error": 0.25})})


def without_facts(folder: Path) -> None:
    save_file(TENSORS, folder / "pass site.safetensors")


def a_key_that_is_a_link(folder: Path) -> None:
    (folder / "key").rename(folder.parent / "moved")
    (folder / "key").symlink_to(folder.parent / "moved")


def no_key(folder: Path) -> None:
    (folder / "key").unlink()


@pytest.mark.parametrize(
    "damage",
    [renamed, of_another_compile, cut, empty, linked, a_folder, a_pipe, a_stranger, without_a_hash, without_facts,
     a_key_that_is_a_link, no_key],
)  # fmt: skip
def test_what_no_compile_has_put_there_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "progress"
    folder.mkdir()
    kept(folder, what="pass other")
    kept(folder)
    damage(folder)
    with pytest.raises(OutputError) as caught:
        read(folder)
    assert str(folder) in (caught.value.where or "") and caught.value.do


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({**TENSORS, "packed": torch.zeros(6, 9, dtype=torch.uint8)}, {"error": 0.25}),
        ({**TENSORS, "scale": torch.rand(6, 1, dtype=torch.float64)}, {"error": 0.25}),
        ({**TENSORS, "more": torch.rand(1)}, {"error": 0.25}),
        ({name: TENSORS[name] for name in ("packed", "scale")}, {"error": 0.25}),
        (TENSORS, {"error": "much"}),
        (TENSORS, [0.25]),
        (TENSORS, None),
    ],
)
def test_what_a_pass_does_not_write_is_refused_though_its_hash_is_right(
    tensors: dict[str, torch.Tensor], facts: object, tmp_path: Path
) -> None:
    Checkpoint.open(tmp_path, "the key").save("pass site", tensors, facts)
    with pytest.raises(OutputError, match="cannot be read") as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / "pass site.safetensors")


def test_a_killed_writer_leaves_a_folder_that_goes_on(tmp_path: Path) -> None:
    path = kept(tmp_path)
    for rubbish in (tmp_path / ".partial" / "new", tmp_path / ".partial" / ".tmpX"):
        rubbish.parent.mkdir(exist_ok=True)
        rubbish.write_bytes(b"half")
    read(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["key", path.name]
    (tmp_path / "new" / ".partial").mkdir(parents=True)
    Checkpoint.open(tmp_path / "new", "the key")
    assert os.listdir(tmp_path / "new") == ["key"]
