"""Tensors in unlinked files are those that were put there, cannot be written to, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qpcompile.errors import OutputError
from qpcompile.ir import mapped_tensors
from qpcompile.ir.mapped_tensors import Offload, to_file


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is a shared mapping for reading."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights = line.split()[:2]
        first, last = (int(each, 16) for each in place.split("-"))
        if first <= tensor.data_ptr() < last:
            return rights == "r--s"
    return False


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3, 5, 7),
        "half": torch.randn(33).to(torch.bfloat16),
        "marks": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "one": torch.tensor(7),
        "strided": torch.randn(6, 4).T,
    }
    found = to_file(tensors, tmp_path)
    assert list(found) == list(tensors) and not list(tmp_path.iterdir())
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].data_ptr() % 64 == 0 and (not tensor.numel() or is_mapped(found[name])), name
    empty = to_file({"none": torch.empty(0)}, tmp_path)["none"]
    assert empty.shape == (0,)


def test_only_large_tensors_leave_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_tensors, "LARGE", 64)
    offload = Offload.open(tmp_path / "new" / "folder")
    small, large = torch.randn(15), torch.randn(16)
    assert offload.keep(small) is small
    kept = offload.keep(large)
    assert torch.equal(kept, large) and is_mapped(kept) and not is_mapped(large)
    assert Offload.open(None).keep(large) is large


def test_a_file_ends_with_its_last_tensor(tmp_path: Path) -> None:
    def files() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/")

    found = to_file({"x": torch.randn(100), "y": torch.randn(100)}, tmp_path)
    assert files() == 1
    view = found.pop("x")[10:20]
    found.clear()
    assert files() == 1 and view.shape == (10,)
    del view
    assert files() == 0


def test_nothing_remains_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom qpcompile.ir.mapped_tensors import Offload\n"
        "kept = Offload(Path(sys.argv[1])).keep(torch.randn(2**19))\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_named(named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped_tensors.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(mapped_tensors.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(OutputError, match="No space left on device") as error:
        to_file({"x": torch.ones(3)}, tmp_path if named else None)
    assert error.value.where == str(tmp_path) and "--offload" in str(error.value) and "TMPDIR" in str(error.value)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Offload.open(tmp_path / "file" / "folder")


def test_many_tensors_take_no_descriptors(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [to_file({"x": torch.full((4,), number)}, tmp_path)["x"] for number in range(300)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(tensor.tolist() == [number] * 4 for number, tensor in enumerate(kept))
