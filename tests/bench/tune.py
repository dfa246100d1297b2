"""Measure tiles of linear_int on this GPU and write its table: python tests/bench/tune.py [--seconds 60] [--start]

--seconds: the tiles that matter most come first, and those that the time is not enough for stay the rule's. --start
needs no GPU: it writes the rule's tiles for the GPUs below, marked as not measured.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import triton
from gemm_layers import LAYERS
from gpu_timing import copies_beyond, interleaved

from qpcompile.kernels.linear_int.packing import packed_width
from qpcompile.kernels.linear_int.tuning import (
    BUCKETS,
    FOLDER,
    RAW_TOKENS,
    Table,
    Tile,
    bucket,
    slug,
    start_tile,
    write_table,
)

KNOWN = {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132}
"""GPUs whose start tables are shipped, and their multiprocessors."""
NO_GPU = 2


def candidates(tokens: int, in_features: int, shared: int) -> Iterator[Tile]:
    """Tiles worth measuring: they fit `shared` bytes and the registers, and waste at most half of their tokens."""
    widths = [width for width in (16, 32, 64, 128, 256) if width < 2 * max(tokens, 9)]
    accumulators = 2 if tokens <= RAW_TOKENS else 1
    for out, width, step, warps, stages, split in itertools.product(
        (64, 128), widths, (64, 128), (4, 8), (3, 4, 5), (1, 2, 4, 8)
    ):
        tile = Tile(out, width, step, warps, stages, split)
        steps = in_features // 2 // step
        # Eight warps are two groups of four, of 64 rows each.
        fits = tile.shared <= shared and tile.sums * accumulators <= 128 and out * 4 >= 64 * warps
        if fits and split <= max(1, steps // 2):
            yield tile


def best(out_features: int, in_features: int, tokens: int) -> Tile:
    """The fastest tile on this GPU: a short run of all candidates, a longer one of the best four and the rule's."""
    gpu = torch.cuda.get_device_properties(0)
    found = list(candidates(tokens, in_features, gpu.shared_memory_per_block_optin))
    times = measure(found, out_features, in_features, tokens, rounds=3)
    ranked = [tile for _, tile in sorted(zip(times, found, strict=True), key=lambda pair: pair[0])]
    start = start_tile(gpu.multi_processor_count, out_features, in_features, tokens)
    final = [start, *[tile for tile in ranked[:4] if tile != start]]
    times = measure(final, out_features, in_features, tokens, rounds=25)
    return min(zip(times, final, strict=True), key=lambda pair: pair[0])[1]


def measure(tiles: Sequence[Tile], out_features: int, in_features: int, tokens: int, rounds: int) -> list[float]:
    """Seconds per call with each tile, on random codes and weights that are not in the cache; a failing tile takes inf.

    Tiles are timed a few at a time, because each holds a captured graph.
    """
    from qpcompile.kernels.linear_int.triton import linear_int

    width = packed_width(in_features)
    copies = copies_beyond(torch.cuda.get_device_properties(0).L2_cache_size, out_features * width)
    weights = torch.randint(0, 256, (copies, out_features, width), dtype=torch.uint8, device="cuda")
    q = torch.randint(-8, 8, (tokens, in_features), dtype=torch.int8, device="cuda")
    scale, weight_scale = torch.rand(tokens, 1, device="cuda"), torch.rand(out_features, 1, device="cuda")

    def seconds(tile: Tile) -> float:
        calls = [
            lambda weight=weight: linear_int(q, scale, weight, weight_scale, None, torch.bfloat16, 4, tile=tile)
            for weight in weights
        ]
        try:
            return interleaved([calls], rounds, least=1e-3)[0].median
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
            print(f"  {tile} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            return float("inf")

    return [seconds(tile) for tile in tiles]


def by_weight() -> list[tuple[int, int, int]]:
    """(out_features, in_features, bucket) of every tile: a step of decoding and whole prompts before other sizes, the
    layers with most weights first.
    """
    first = (bucket(1), bucket(640), bucket(208))
    limits = [*first, *(limit for limit in BUCKETS if limit not in first)]
    sizes = sorted({(layer.out_features, layer.in_features) for layer in LAYERS}, key=lambda each: -each[0] * each[1])
    return [(*size, limit) for limit in limits for size in sizes]


def tune(seconds: float = float("inf")) -> Table:
    """The table of this GPU, measured as far as the time goes."""
    gpu = torch.cuda.get_device_properties(0)
    tiles, end, measured = start_table(gpu.name, gpu.multi_processor_count).tiles, time.monotonic() + seconds, 0
    for place in by_weight():
        if time.monotonic() >= end:
            break
        tiles[place] = tile = best(*place)
        measured += 1
        print(f"{place[0]} x {place[1]}, {place[2]} tokens: {tile}", flush=True)
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton.__version__}
    return Table(gpu.name, gpu.multi_processor_count, versions | {"tiles": f"{measured} of {len(tiles)}"}, tiles)


def start_table(gpu: str, processors: int) -> Table:
    """The rule's tiles for the measured layers."""
    tiles = {
        (layer.out_features, layer.in_features, limit): start_tile(
            processors, layer.out_features, layer.in_features, limit
        )
        for layer in LAYERS
        for limit in BUCKETS
    }
    return Table(gpu, processors, None, tiles)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables; returns 2 if a GPU is needed and there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", action="store_true", help="write the rule's tables, without measuring")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of measuring; default: all tiles")
    options = parser.parse_args(arguments)
    if options.start:
        tables = [start_table(*item) for item in KNOWN.items()]
    elif torch.cuda.is_available():
        tables = [tune(options.seconds)]
    else:
        print("tuning measures on a CUDA GPU, and torch finds none here (--start needs none)", file=sys.stderr)
        return NO_GPU
    FOLDER.mkdir(exist_ok=True)
    for table in tables:
        path = FOLDER / f"{slug(table.gpu)}.json"
        path.write_text(write_table(table), "utf-8")
        print(f"wrote {path.relative_to(FOLDER.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
