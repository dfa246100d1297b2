"""Inputs of an exported model are checked before a graph runs: what would be dropped or misread is refused by name."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.folder import RunnerError

Array = np.ndarray[Any, Any]

IDS, MASK, PIXELS, GRID = "input_ids", "attention_mask", "pixel_values", "image_grid_thw"
# Say which tokens are pictures, as the ids do.
TYPES = ("mm_token_type_ids", "token_type_ids")
MOST_ARRAYS, MOST_BYTES = 64, 2**32
PROCESSOR = "build the inputs with the model's own processor"


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file; nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if len(entries) > MOST_ARRAYS or sum(entry.file_size for entry in entries) > MOST_BYTES:
            raise RunnerError("the file holds too much", str(path), f"give at most {MOST_BYTES} bytes of arrays")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, MemoryError, KeyError, NotImplementedError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    except (zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> RunnerError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RunnerError(f"this is not an .npz file that can be read: {first}", str(path), "write it with numpy.savez")


def check_inputs(
    given: Mapping[str, Any], image: int, video: int | None, vocabulary: int, pictures: Collection[str] = (PIXELS, GRID)
) -> dict[str, Array]:
    """What the runner takes of `given`, as arrays: ids i64[B, S], a mask i64[B, S], and pixels and sizes where given.

    Args:
        given: the processor's arrays by name.
        image, video: the tokens that pictures and videos take the place of.
        vocabulary: number of tokens.
        pictures: names of what is given of pictures.
    """
    arrays = {name: np.asarray(value) for name, value in given.items() if value is not None}
    ids = arrays.get(IDS)
    if ids is None:
        raise RunnerError("there is no prompt", IDS, f"pass {IDS}; {PROCESSOR}")
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or not ids.size:
        raise RunnerError(f"{IDS} is {_kind(ids)}", IDS, "give whole numbers, a row for each prompt: i64[B, S]")
    # Placeholders may lie beyond the vocabulary.
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or bool(((ids >= vocabulary) & (ids != image)).any()):
        wrong = lowest if lowest < 0 else highest
        raise RunnerError(f"{IDS} has token {wrong}; this model's are 0 to {vocabulary - 1}", IDS, PROCESSOR)
    ids = ids.astype(np.int64)
    _refuse_dropped(arrays, ids, image, pictures)
    if video is not None and bool((ids == video).any()):
        raise RunnerError(f"the prompt has video tokens (id {video})", IDS, "ask about pictures: no video is seen here")
    checked = {IDS: ids, MASK: _mask(arrays.get(MASK), ids)}
    return checked | {name: arrays[name] for name in pictures if name in arrays}


def _refuse_dropped(arrays: Mapping[str, Array], ids: Array, image: int, pictures: Collection[str]) -> None:
    for name, value in arrays.items():
        if name in TYPES and value.shape == ids.shape and bool((value == (ids == image)).all()):
            continue
        if name not in (IDS, MASK, *pictures):
            raise RunnerError(
                f"this runner does not take {name[:100]}: the answer would not depend on it",
                f"inputs, given {', '.join(sorted(arrays))}"[:500],
                "leave it out if the answer may do without it, or use the compiled module",
            )


def _mask(mask: Array | None, ids: Array) -> Array:
    if mask is None:
        return np.ones_like(ids)
    if mask.dtype.kind not in "iub" or mask.shape != ids.shape:
        raise RunnerError(f"{MASK} is {_kind(mask)}, {IDS} is {_kind(ids)}", MASK, "give one number for each token")
    if not bool(np.isin(mask, (0, 1)).all()) or not bool(mask[:, -1].all()):
        raise RunnerError(
            f"{MASK} has other values than 0 and 1, or a row that ends with 0",
            MASK,
            "give 1 for tokens and 0 for padding, and pad on the left",
        )
    return mask.astype(np.int64)


def check_pixels(pixels: Array, shape: list[Any]) -> None:
    """pixels: what the vision graph is given; shape: what it takes, sizes that vary by name."""
    fits = pixels.ndim == len(shape) and all(
        not isinstance(size, int) or size == found for size, found in zip(shape, pixels.shape, strict=True)
    )
    if pixels.dtype.kind != "f" or not fits or not pixels.size:
        takes = f"[{', '.join(map(str, shape))}]"
        raise RunnerError(f"{PIXELS} is {_kind(pixels)}; this model takes floats {takes}", PIXELS, PROCESSOR)
    if not bool(np.isfinite(pixels).all()):
        raise RunnerError(f"{PIXELS} has values that are not finite", PIXELS, f"find where they come from; {PROCESSOR}")


def check_grids(grids: Array, patches: int, merge: int, visual: Array) -> None:
    """Sizes of pictures agree with patches and with the prompt.

    Args:
        grids: frames, rows and columns of each picture.
        patches: number of patches given.
        merge: a token covers merge x merge patches.
        visual: bool[B, S], tokens of pictures.
    """
    if grids.dtype.kind not in "iu" or grids.ndim != 2 or grids.shape[1] != 3 or bool((grids < 1).any()):
        raise RunnerError(f"{GRID} is {_kind(grids)}", GRID, "give frames, rows and columns: i64[n, 3], 1 or more")
    sizes = [[int(size) for size in grid] for grid in grids]
    total = sum(frames * rows * columns for frames, rows, columns in sizes)
    if total != patches or any(size % merge for _, *sides in sizes for size in sides):
        raise RunnerError(f"{GRID} has {total} patches, {patches} were given", GRID, PROCESSOR)
    runs = [int(run.sum()) for row in visual for run in np.split(row, np.flatnonzero(np.diff(row)) + 1) if run[0]]
    if runs != [frames * rows * columns // merge**2 for frames, rows, columns in sizes]:
        raise RunnerError(f"the prompt has runs of {runs[:8]} image tokens, which are not {GRID}'s", IDS, PROCESSOR)


def _kind(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
