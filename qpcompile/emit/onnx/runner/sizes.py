"""Folders with a vision graph for each size of picture: which graph takes which picture, and the tokens it becomes.

`sizes.json` lists the graphs, the largest picture first. A graph takes the tensors of one picture; those of several
come one after the other along one axis of each tensor, as processors give them. Where that gave the module's answers
when the folder was made, `several` is true; calls with several pictures are refused otherwise, since some families'
features of a picture depend on the pictures before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.choice import whole
from qpcompile.emit.onnx.runner.folder import NEW_FOLDER, RunnerError, read_json

Array = np.ndarray[Any, Any]

SIZES = "sizes.json"
MOST_SIZES, MOST_OF_PICTURE = 32, 2**20


@dataclass(frozen=True)
class Size:
    """One size of picture.

    graph: the name of its vision graph. tokens: visual tokens of a picture. values: whole numbers that come with the
    pixels, which the graph was made for. positions: i64[axes, tokens] from the first token on, or None; advance:
    i64[axes], that of the token after the picture. shapes: of the graph's inputs.
    """

    graph: str
    tokens: int
    values: Mapping[str, Array]
    positions: Array | None
    advance: Array
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, entry: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], where: str) -> Size:
        """One entry of the file; shapes: by graph and input. Raises RunnerError for what no export writes."""
        sound = isinstance(entry, dict) and isinstance(entry.get("graph"), str) and entry["graph"] in shapes
        if not sound or not isinstance(entry.get("values"), dict):
            raise RunnerError("an entry names no graph of this folder, or no values", where, NEW_FOLDER)
        tokens = whole(entry.get("tokens"), "tokens", 1, MOST_OF_PICTURE, where)
        values = {name: _whole_numbers(value, where) for name, value in entry["values"].items()}
        positions = None if entry.get("positions") is None else _whole_numbers(entry["positions"], where)
        advance = _whole_numbers(entry.get("advance"), where)
        if positions is not None and (positions.ndim != 2 or positions.shape != (*advance.shape, tokens)):
            raise RunnerError("positions are not one for each token", where, NEW_FOLDER)
        return cls(entry["graph"], tokens, values, positions, advance, shapes[entry["graph"]])

    def take(self, left: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]] | None:
        """The first picture of `left`, and what is left after it; None if it has another size."""
        taken, rest = dict[str, Array](), dict[str, Array]()
        for name, shape in [*self.shapes.items(), *((name, value.shape) for name, value in self.values.items())]:
            array = left.get(name)
            if array is None or array.ndim != len(shape) or not shape:
                return None
            longer = [axis for axis in range(array.ndim) if array.shape[axis] != shape[axis]]
            axis = longer[0] if longer else 0
            if len(longer) > 1 or array.shape[axis] < shape[axis]:
                return None
            taken[name], rest[name] = np.split(array, [shape[axis]], axis)
        if any(not np.array_equal(taken[name], value) for name, value in self.values.items()):
            return None
        return taken, rest


def read_sizes(path: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Size]:
    """The sizes of a folder; shapes: of the inputs of its vision graphs, by graph and input."""
    entries = read_json(path).get("sizes")
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_SIZES:
        raise RunnerError("it lists no sizes of pictures", str(path), NEW_FOLDER)
    return [Size.read(entry, shapes, str(path)) for entry in entries]


def takes_several(path: Path) -> bool:
    """Whether answers to several pictures in a call were those of the module, as the file says."""
    said = read_json(path).get("several")
    if not isinstance(said, bool):
        raise RunnerError("it does not say whether a call may have several pictures", str(path), NEW_FOLDER)
    return said


def split_pictures(
    sizes: Sequence[Size], arrays: Mapping[str, Array], visual: Array
) -> list[tuple[Size, dict[str, Array]]]:
    """Every picture of a call with its size, in reading order.

    arrays: all tensors of pictures. visual: bool[B, S], image tokens; a picture's are in one run. Raises RunnerError
    for a picture of a size that no graph was made for.
    """
    runs = [int(run.sum()) for row in visual for run in np.split(row, np.flatnonzero(np.diff(row)) + 1) if run[0]]
    found: list[tuple[Size, dict[str, Array]]] = []
    left = dict(arrays)
    while runs:
        for size in sizes:
            if size.tokens <= runs[0] and (parts := size.take(left)) is not None:
                break
        else:
            known = "; ".join(f"{size.tokens} tokens of {dict(size.shapes)}" for size in sizes)
            raise RunnerError(
                f"picture {len(found) + 1} has a size that this folder has no graph for",
                SIZES,
                f"give pictures of the sizes it was exported for: {known}"[:500],
            )
        taken, left = parts
        found.append((size, taken))
        runs[0] -= size.tokens
        runs = runs if runs[0] else runs[1:]
    if any(array.size for array in left.values()) and found:
        raise RunnerError(f"there are more pictures than the {len(found)} in the prompt", SIZES, "give as many of both")
    return found


def sized_positions(visual: Array, mask: Array, sizes: Sequence[Size], axes: int) -> Array:
    """Positions i64[axes, B, S]: text counts on all axes, a picture has those of its size.

    visual: bool[B, S]. mask: i64[B, S], 0 on padding. sizes: of all pictures, in reading order.
    """
    positions = np.zeros((axes, *visual.shape), np.int64)
    pictures = iter(sizes)
    for row, real in enumerate(mask.astype(bool)):
        places, start, at = np.flatnonzero(real), np.zeros(axes, np.int64), 0
        while at < len(places):
            if not visual[row, places[at]]:
                positions[:, row, places[at]] = start
                start, at = start + 1, at + 1
                continue
            size = next(pictures)
            if size.positions is None or len(size.positions) != axes:
                raise RunnerError("a size says no positions on all axes", SIZES, NEW_FOLDER)
            positions[:, row, places[at : at + size.tokens]] = size.positions + start[:, None]
            start, at = start + size.advance, at + size.tokens
    return positions


def _whole_numbers(value: Any, where: str) -> Array:
    """A list of lists of numbers from -2**20 to 2**20, or of true and false, as an array."""
    leaves, level = list[Any](), [value]
    while level:
        leaves += [each for each in level if not isinstance(each, list)]
        level = [each for outer in level if isinstance(outer, list) for each in outer]
    # Before numpy sees them: it gives every text of a list the room of the longest.
    sound = all(isinstance(each, int) and abs(each) <= MOST_OF_PICTURE for each in leaves)
    if not isinstance(value, list) or not sound or len(leaves) > MOST_OF_PICTURE:
        raise RunnerError(f"a list holds more, or other, than whole numbers up to {MOST_OF_PICTURE}", where, NEW_FOLDER)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RunnerError("a list has rows of several lengths", where, NEW_FOLDER) from error
    return array if array.size else array.astype(np.int64)
