"""Tile selection for the GPU kernel of linear_int: a tuning table per GPU, and a heuristic for everything else.

`tile_for` looks in `tiles/<gpu>.json` for the layer's N and K and the bucket of the token count. For a layer not in the
table, the nearest layer of that bucket provides the tile, and the heuristic its split; a GPU without a table uses the
heuristic alone. Nothing is measured here: `python tests/bench/tune.py` measures and writes the table.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
"""Upper bounds of the buckets of token counts that share a tile; larger counts use the last one."""
RAW_TOKENS = 64
"""The most tokens for which the kernel takes unprepared codes: one launch less, for a third product per step."""
FOLDER = Path(__file__).with_name("tiles")


@dataclass(frozen=True)
class Tile:
    """The block of one program: `out` weight rows by `tokens` tokens, `step` packed bytes per row at a time.

    `split` programs share the columns of one tile and add their partial sums (split-K).
    """

    out: int
    tokens: int
    step: int
    warps: int
    stages: int
    split: int = 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory: both planes of the activations per stage, weights a stage less (read at once)."""
        return self.step * ((self.stages - 1) * self.out + self.stages * 2 * self.tokens)

    @property
    def sums(self) -> int:
        """Registers per thread for one accumulator."""
        return self.out * self.tokens // (32 * self.warps)


SHAPES = {
    16: Tile(out=64, tokens=16, step=128, warps=4, stages=4),
    32: Tile(out=64, tokens=32, step=128, warps=4, stages=4),
    64: Tile(out=64, tokens=64, step=128, warps=4, stages=3),
    256: Tile(out=128, tokens=64, step=128, warps=8, stages=3),
    1024: Tile(out=128, tokens=128, step=64, warps=8, stages=4),
    BUCKETS[-1]: Tile(out=128, tokens=256, step=64, warps=8, stages=4),
}
"""The heuristic's tiles by maximum token count, of split 1: chosen by inspecting machine code, not by benchmarks."""


@dataclass(frozen=True)
class Table:
    """The tiles of one GPU by (out_features, in_features, bucket); `tuned` records how they were measured."""

    gpu: str
    processors: int
    tuned: dict[str, str] | None
    tiles: dict[tuple[int, int, int], Tile]


def bucket(tokens: int) -> int:
    """The bucket of a token count."""
    return next((limit for limit in BUCKETS if tokens <= limit), BUCKETS[-1])


def tile_for(gpu: str, processors: int, out_features: int, in_features: int, tokens: int) -> Tile:
    """The tile for a layer [N, K] on `tokens` tokens, on the GPU of that name and number of multiprocessors."""
    return _tile_for_bucket(gpu, processors, out_features, in_features, bucket(tokens))


@cache
def _tile_for_bucket(gpu: str, processors: int, out_features: int, in_features: int, limit: int) -> Tile:
    table = table_of(gpu)
    if table is None:
        return start_tile(processors, out_features, in_features, limit)
    exact = table.tiles.get((out_features, in_features, limit))
    if exact is not None:
        return exact
    near = [key for key in table.tiles if key[2] == limit]
    if not near:
        return start_tile(processors, out_features, in_features, limit)
    nearest = min(near, key=lambda key: abs(math.log(key[0] / out_features)) + abs(math.log(key[1] / in_features)))
    return with_split(table.tiles[nearest], processors, out_features, in_features, limit)


def start_tile(processors: int, out_features: int, in_features: int, tokens: int) -> Tile:
    """The heuristic: a tile by the number of tokens, and enough splits to occupy every multiprocessor."""
    shape = SHAPES[next((limit for limit in SHAPES if tokens <= limit), BUCKETS[-1])]
    return with_split(shape, processors, out_features, in_features, tokens)


def with_split(tile: Tile, processors: int, out_features: int, in_features: int, tokens: int) -> Tile:
    """`tile` split so that each multiprocessor has one program, or two if the layer is bound by weight bandwidth."""
    programs = math.ceil(out_features / tile.out) * math.ceil(tokens / tile.tokens)
    wanted = processors * (2 if tokens <= RAW_TOKENS else 1)
    # A program with fewer than two steps is all prologue and epilogue.
    most = max(1, math.ceil(in_features / 2 / tile.step) // 2)
    return replace(tile, split=min(most, math.ceil(wanted / programs)))


@cache
def table_of(gpu: str) -> Table | None:
    """The shipped table of a GPU, or None."""
    path = FOLDER / f"{slug(gpu)}.json"
    return read_table(path.read_text("utf-8")) if path.exists() else None


def slug(gpu: str) -> str:
    """The name of a GPU as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read_table(text: str) -> Table:
    """The inverse of `write_table`."""
    data: dict[str, Any] = json.loads(text)
    rows = {(row["out_features"], row["in_features"], row["tokens"]): Tile(**row["tile"]) for row in data["rows"]}
    return Table(data["gpu"], data["processors"], data["tuned"], rows)


def write_table(table: Table) -> str:
    """A table as JSON text, one line per tile."""
    rows = [
        {"out_features": key[0], "in_features": key[1], "tokens": key[2], "tile": asdict(tile)}
        for key, tile in sorted(table.tiles.items())
    ]
    head = {"gpu": table.gpu, "processors": table.processors, "tuned": table.tuned}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head, indent=2)[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n'
