"""Example inputs that the modules of an ONNX folder are exported with: every open axis has a size of its own.

Two axes of one size would be taken for the same axis; an axis of size 0 or 1 for a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.exporters.utils import precompute_export_inputs

from qpcompile.emit.onnx_runner import COUNT, FEATURES, IDS, MASK, POSITIONS, SEEN, VISUAL
from qpcompile.emit.onnx_wrap import GRID, PICTURES, Component, PackedVision
from qpcompile.errors import ExportError
from qpcompile.ir.program import VISION, Program

BATCH, BEFORE, BETWEEN, AFTER = 3, 5, 23, 9


def vision_example(program: Program, module: Component) -> dict[str, torch.Tensor]:
    """Pictures for the vision module; of several sizes where the tower takes that."""
    config, dtype = program.host.config.vision_config, program.host.dtype
    if not isinstance(module, PackedVision):
        size = getattr(config, "image_size", None)
        if size is None:
            raise ExportError(
                "the pictures of this family have neither one size nor a grid of patches",
                where=PICTURES,
                do="use the compiled module: the ONNX runner has no code for this family",
            )
        height, width = (size, size) if isinstance(size, int) else size
        return {PICTURES: torch.zeros(BATCH, getattr(config, "num_channels", 3), height, width, dtype=dtype)}
    tower = program.host.get_submodule(program.graphs[VISION].owner)
    merge = config.spatial_merge_size
    grids = torch.tensor([[1, 4 * merge, 6 * merge], [1, 10 * merge, 2 * merge], [1, 4 * merge, 5 * merge]])
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    patch = channels * config.temporal_patch_size * config.patch_size**2
    arguments: dict[str, Any] = {
        "hidden_states": torch.zeros(int(grids.prod(1).sum()), patch, dtype=dtype),
        "pixel_values": torch.zeros(int(grids.prod(1).sum()), patch, dtype=dtype),
        GRID: grids,
    }
    precompute_export_inputs(tower, arguments)
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def prefill_example(program: Program, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts with a picture each; features: f[N, C], of any picture."""
    token = program.host.config.image_token_id
    ids = torch.full((BATCH, BEFORE + BETWEEN + AFTER), 0 if token else 1)
    ids[:, BEFORE : BEFORE + BETWEEN] = token
    mask = torch.ones_like(ids)
    positions = program.host._prepare_position_ids_for_generation(ids, {IDS: ids, MASK: mask})
    return {
        IDS: ids,
        FEATURES: torch.zeros(BATCH * BETWEEN, features.shape[-1], dtype=features.dtype),
        MASK: mask,
        POSITIONS: positions,
        VISUAL: ids == token,
        COUNT: torch.arange(BETWEEN),
    }


def decode_example(
    prefill: Component, results: tuple[torch.Tensor, ...], prompt: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One token on top of what the prefill module returned for `prompt`."""
    ids, mask = prompt[IDS], prompt[MASK]
    state = dict(zip(prefill.outputs[1:], results[1:], strict=True))
    example = {
        IDS: ids[:, :1],
        MASK: torch.cat([mask, mask[:, :1]], dim=1),
        POSITIONS: prompt[POSITIONS][..., -1:] + 1,
        SEEN: torch.arange(ids.shape[1]),
    }
    paths = [name for name in state]
    return example | {path: state[path] for path in paths} | {_input(path): state[path] for path in paths}


def _input(output: str) -> str:
    path = output.removeprefix("present.")
    return path if path.split(".")[0] in ("kept", "alive") else f"past_key_values.{path}"


