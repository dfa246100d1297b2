"""Inputs of the runner: any that it would drop or misread is refused by name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.inputs import MOST_ARRAYS, check_grids, check_inputs, read_arrays
from qpcompile.emit.onnx.runner.runner import OnnxVLM

Arrays = dict[str, Any]
Tiny = tuple[Any, dict[str, dict[str, torch.Tensor]]]
IMAGE, VIDEO = 90, 91


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    return lambda given: given | {name: change(given[name])}


def more(**arrays: Any) -> Callable[[Arrays], Arrays]:
    return lambda given: given | arrays


def poisoned(pixels: Any) -> Any:
    pixels = pixels.copy()
    pixels.flat[5] = np.nan
    return pixels


def closed_at_the_end(mask: Any) -> Any:
    mask = mask.copy()
    mask[0, -1] = 0
    return mask


IDS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"
WRONG: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "video": (more(pixel_values_videos=np.zeros((4, 3))), "does not take pixel_values_videos"),
    "sizes": (more(image_sizes=np.array([[32, 32]])), "does not take image_sizes"),
    "audio": (more(input_features=np.zeros((1, 4))), "does not take input_features"),
    "beams": (more(num_beams=3), "does not take num_beams"),
    "types that say more": (more(mm_token_type_ids=np.full((2, 30), 2)), "does not take mm_token_type_ids"),
    "grid of a model without": (more(image_grid_thw=np.array([[1, 4, 4]])), "has no use for image_grid_thw"),
    "float ids": (changed(IDS, lambda ids: ids.astype(float)), r"input_ids is float64\[2, 30\]"),
    "one row": (changed(IDS, lambda ids: ids[0]), r"input_ids is int64\[30\]"),
    "no prompt": (changed(IDS, lambda ids: ids[:, :0]), r"input_ids is int64\[2, 0\]"),
    "no rows": (changed(IDS, lambda ids: ids[:0]), "input_ids is int64"),
    "negative": (changed(IDS, lambda ids: ids - 1), "has token -1; this model's are 0 to 98"),
    "large": (changed(IDS, lambda ids: ids + 50), "has token 140"),
    "ragged": (changed(IDS, lambda ids: np.array([[1], [1, 2]], object)), "input_ids is object"),
    "short mask": (changed(MASK, lambda mask: mask[:, 1:]), r"attention_mask is int64\[2, 29\]"),
    "float mask": (changed(MASK, lambda mask: mask * 0.5), "attention_mask is float64"),
    "mask of twos": (changed(MASK, lambda mask: mask * 2), "other values than 0 and 1"),
    "padding on the right": (changed(MASK, closed_at_the_end), "ends with 0"),
    "not a number": (changed(PIXELS, poisoned), "not finite"),
    "larger pictures": (changed(PIXELS, lambda pixels: np.zeros((2, 3, 64, 64), "f")), r"takes floats \[.*3, 32, 32\]"),
    "bytes": (changed(PIXELS, lambda pixels: pixels.astype(np.uint8)), "pixel_values is uint8"),
    "no axis of pictures": (changed(PIXELS, lambda pixels: pixels[0]), "takes floats"),
    "one picture less": (changed(PIXELS, lambda pixels: pixels[:1]), "32 image tokens .* the pictures give 16"),
    "no picture": (changed(PIXELS, lambda pixels: None), "32 image tokens .* the pictures give 0"),
    "no tokens for pictures": (changed(IDS, lambda ids: np.where(ids == IMAGE, 5, ids)), "has 0 image tokens"),
    "nothing new": (more(max_new_tokens=0), "max_new_tokens is 0"),
    "less than nothing": (more(max_new_tokens=-1), "max_new_tokens is -1"),
    "without end": (more(max_new_tokens=10**12), "max_new_tokens is 1000"),
    "half": (more(max_new_tokens=1.5), r"max_new_tokens is 1\.5"),
}


@pytest.fixture(scope="module")
def runner(plain: Path) -> OnnxVLM:
    """A random LLaVA in onnxruntime."""
    return OnnxVLM(plain, threads=1)


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_inputs_are_refused_by_name(
    tiny_llava: Tiny, runner: OnnxVLM, change: Callable[[Arrays], Arrays], message: str
) -> None:
    given = {name: tensor.numpy() for name, tensor in tiny_llava[1]["padded"].items()} | {"max_new_tokens": 2}
    with pytest.raises(RunnerError, match=message) as error:
        runner.generate(**change(given))
    assert error.value.where and error.value.do


def test_what_says_nothing_new_is_taken(tiny_llava: Tiny, runner: OnnxVLM) -> None:
    given: dict[str, Any] = {name: tensor.numpy() for name, tensor in tiny_llava[1]["padded"].items()}
    expected = runner.generate(**given, max_new_tokens=3).tolist()
    types = (given[IDS] == IMAGE).astype(np.int32)
    odd = given | {IDS: given[IDS].astype(np.int32), MASK: given[MASK].astype(bool), "pixel_values_videos": None}
    assert runner.generate(**odd, mm_token_type_ids=types, max_new_tokens=3).tolist() == expected


def test_video_tokens_are_refused() -> None:
    with pytest.raises(RunnerError, match="video tokens"):
        check_inputs({IDS: np.array([[1, VIDEO, 5]])}, IMAGE, VIDEO, 99)


VISUAL = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 0]], bool)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 4, 4], [1, 2, 4]], ""),
        ([[1, 2, 4], [1, 4, 4]], "runs of"),
        ([[1, 4, 6]], "runs of"),
        ([[1, 4, 5], [1, 2, 2]], "patches"),
        ([[1, 4, 4]], "has 16 patches, 24 were given"),
        ([[2**31, 2**31, 4]], "patches, 24 were given"),
        ([[0, 4, 4]], "1 or more"),
        ([1, 4, 6], "1 or more"),
        ([[1.0, 4.0, 6.0]], "1 or more"),
    ],
)
def test_sizes_of_pictures(grids: Any, message: str) -> None:
    if not message:
        check_grids(np.array(grids), 24, 2, VISUAL)
        return
    with pytest.raises(RunnerError, match=message):
        check_grids(np.array(grids), 24, 2, VISUAL)


def npz(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids.npy", content)


def header(shape: str, kind: str = "'<i8'") -> bytes:
    """The header of an .npy file of this shape, without data."""
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def pickled() -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([{}], object), allow_pickle=True)
    return made.getvalue()


FILES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"x" * 100),
    "a single array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a pickle": lambda path: npz(path, pickled()),
    "huge": lambda path: npz(path, header("(4611686018427387904,)")),
    "larger than memory": lambda path: npz(path, header("(1099511627776,)")),
    "negative": lambda path: npz(path, header("(-5,)")),
    "code for a header": lambda path: npz(path, header("__import__('os').getpid()")),
    "no type": lambda path: npz(path, header("(1,)", "'nope'")),
    "cut off": lambda path: npz(path, header("(3,)") + b"12"),
    "too many": lambda path: np.savez(path.open("wb"), *[np.zeros(1)] * (MOST_ARRAYS + 1)),
}


@pytest.mark.parametrize("write", FILES.values(), ids=list(FILES))
def test_files_that_hold_no_inputs(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "in.npz")
    with pytest.raises(RunnerError, match=r"not an \.npz file|holds too much") as error:
        read_arrays(tmp_path / "in.npz")
    assert error.value.where.endswith("in.npz") and error.value.do


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "in.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input_ids.npy", header("(1048576,)") + bytes(2**23))
    monkeypatch.setattr("qpcompile.emit.onnx.runner.inputs.MOST_BYTES", 2**20)
    with pytest.raises(RunnerError, match="holds too much"):
        read_arrays(tmp_path / "in.npz")
