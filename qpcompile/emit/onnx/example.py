"""Example inputs for the graphs of an ONNX folder, in two sizes that differ in every dynamic dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.exporters.utils import precompute_export_inputs

from qpcompile.emit.onnx.masks import tables_of
from qpcompile.emit.onnx.runner.runner import COUNT, IDS, MASK, POSITIONS, SEEN, VALID, VISUAL
from qpcompile.emit.onnx.vision import PICTURES, picture_shape
from qpcompile.emit.onnx.wrap import GRID
from qpcompile.errors import ExportError
from qpcompile.ir.names import CACHE, STATE, Name
from qpcompile.ir.program import PREFILL, VISION, Program
from qpcompile.ir.types import value_types
from qpcompile.runtime.arguments import input_kinds
from qpcompile.runtime.machine import ALIVE, KEPT


@dataclass(frozen=True)
class Sizes:
    """The sizes of one example; `grids` are in units of merged patches."""

    batch: int
    before: int
    visual: int
    after: int
    grids: tuple[tuple[int, int], ...]


SIZES = (Sizes(2, 3, 23, 6, ((4, 6), (10, 2))), Sizes(3, 5, 57, 10, ((4, 7), (9, 5), (2, 3))))


def vision_example(program: Program, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Pictures; of several sizes if the tower supports that."""
    host: Any = program.host
    if GRID not in program.graphs[VISION].inputs:
        return {PICTURES: torch.zeros(sizes.batch, *(picture_shape(program) or ()), dtype=host.dtype)}
    try:
        return _patches(program, sizes)
    except AttributeError as error:
        raise ExportError(
            f"how this family cuts pictures into patches is not known: {error}",
            where="config.vision_config",
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        ) from error


def _patches(program: Program, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Packed patches of pictures of several sizes, and the layout inputs of a tower."""
    host: Any = program.host
    config, dtype = host.config.vision_config, host.dtype
    merge = config.spatial_merge_size
    grids = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in sizes.grids])
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    width = channels * config.temporal_patch_size * config.patch_size**2
    patches = torch.zeros(int(grids.prod(1).sum()), width, dtype=dtype)
    arguments: dict[str, Any] = {"hidden_states": patches, PICTURES: patches, GRID: grids}
    precompute_export_inputs(host.get_submodule(program.graphs[VISION].owner), arguments)
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def prefill_example(program: Program, sizes: Sizes, said: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts with one picture each; said: the outputs of the vision graph, f[N, ...] for any visual tokens."""
    host: Any = program.host
    token = host.config.image_token_id
    ids = torch.full((sizes.batch, sizes.before + sizes.visual + sizes.after), 0 if token else 1)
    ids[:, sizes.before : sizes.before + sizes.visual] = token
    mask = torch.ones_like(ids)
    generator = torch.Generator().manual_seed(0)
    count = sizes.batch * sizes.visual
    of_pictures = {
        name: torch.randn(count, *rows.shape[1:], generator=generator).to(rows.dtype) for name, rows in said.items()
    }
    return {
        IDS: ids,
        **of_pictures,
        MASK: mask,
        POSITIONS: _positions(program, ids, mask),
        VISUAL: ids == token,
        VALID: mask.bool(),
        COUNT: torch.arange(sizes.visual),
        **{path: _table(program, path, ids.shape[0], ids.shape[1], ids.shape[1]) for path in tables_of(program)},
    }


def _positions(program: Program, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """i64[B, S], or i64[axes, B, S] where the decoder takes several: some hosts give them for pictures only."""
    host: Any = program.host
    given = host._prepare_position_ids_for_generation(ids, {IDS: ids, MASK: mask})
    prefill = program.graphs[PREFILL]
    taken = next((path for path in prefill.inputs if path == POSITIONS), None)
    if given.ndim != 2 or taken is None:
        return given
    first, *others = value_types(prefill)[prefill.placeholder(taken)].sizes
    return given.expand(first.fixed, -1, -1) if len(others) == 2 and first.fixed else given


def _table(program: Program, path: str, batch: int, new: int, seen: int) -> torch.Tensor:
    """A mask in which every token sees all before it."""
    dtype, _ = input_kinds(program.graphs[PREFILL])[path]
    table = torch.ones(new, seen, dtype=torch.bool).tril(seen - new).expand(batch, 1, -1, -1)
    return table if dtype == torch.bool else torch.zeros(table.shape, dtype=dtype).masked_fill(~table, -1e9)


def decode_example(
    program: Program, prompt: dict[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One token after the prefill results of `prompt`."""
    ids, mask = prompt[IDS], prompt[MASK]
    example = {
        IDS: ids[:, :1],
        MASK: torch.cat([mask, mask[:, :1]], dim=1),
        POSITIONS: prompt[POSITIONS][..., -1:] + 1,
        SEEN: torch.arange(ids.shape[1]),
        **{path: _table(program, path, ids.shape[0], 1, ids.shape[1] + 1) for path in tables_of(program)},
    }
    for name, value in results.items():
        path = Name(name.removeprefix("present."))
        if path.root == KEPT:
            example[path] = torch.cat([value, value.new_full((value.shape[0], 1), ids.shape[1])], dim=1)
        elif path.root == STATE:
            example[path] = value
        elif path.root == ALIVE:
            example[path] = torch.cat([value, value.new_ones(value.shape[0], 1)], dim=1)
        else:
            example[f"{CACHE}.{path}"] = value
    return example
