"""Host-side preprocessing of data-dependent values before a graph runs: window and patch tables, dense deepstack.

The same function serves tracing and execution, so that a graph always gets the inputs it was traced with. It builds on
`transformers.exporters`, which does the same for packed pictures (segments, window order, grid interpolation).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from transformers.exporters.utils import module_device, module_dtype, precompute_export_inputs

from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import expression
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.ir.types import TYPE
from qpcompile.nested import is_dict, is_list

DEEPSTACK, VISUAL_POSITIONS, SIZES = "deepstack_visual_embeds", "visual_pos_masks", "image_sizes"
MASK, IDS, EMBEDDINGS, POSITIONS = "attention_mask", "input_ids", "inputs_embeds", "position_ids"
# What transformers calls the function that counts positions by token ids.
COUNTING = "create_position_ids_from_input_ids"
# The mask of the tokens that stand for pictures, of models whose pictures have no token of their own.
PICTURES_AT = "image_embeds_position_mask"
PIXELS, ENCODED = "pixel_values", "mm_encoder_outputs"
# Keys of `Graph.constants`: which of TABLES stands in for the sizes of pictures; how many axes the masks have; whether
# attention without a mask hides the future.
TABLE, MASK_AXES, CAUSAL = "table", "mask_axes", "causal"
# `absent.<input>`: zeros stand for an input of pictures in a prompt without any, with so many entries on an axis whose
# size neither the prompt nor the graph gives (qpcompile/capture/text_alone.py).
ABSENT = "absent"
# What the states are of that cross-attention reads: pictures alone, or the tokens of an encoder's prompt, which has
# pictures among text.
STATES_OF, PICTURES, PROMPT = "states_of", "pictures", "prompt"


def prepare(module: torch.nn.Module, arguments: dict[str, Any], table: str | None = None) -> dict[str, Any]:
    """The arguments of one call of `module` with all data-dependent values as tensors, on its device.

    Floating-point tensors are cast to the module's type, like the exporter does before tracing: pictures come in
    float32.
    """
    arguments = dict(arguments)
    if table is not None and arguments.get(SIZES) is not None:
        arguments[SIZES] = TABLES[table](module, [tuple(map(int, size)) for size in arguments[SIZES]])
    else:
        precompute_export_inputs(module, arguments)
    if arguments.get(DEEPSTACK) is not None:
        mask = arguments.pop(VISUAL_POSITIONS)
        arguments[DEEPSTACK] = [_scattered(arguments["inputs_embeds"], mask, visual) for visual in arguments[DEEPSTACK]]
    return moved(module, arguments)


def _positions(module: torch.nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor | None:
    """i64[B, S], of a decoder that counts positions by its ids, without padding; None of others."""
    counting: Any = next((part for part in module.modules() if hasattr(part, COUNTING)), None)
    if counting is None or POSITIONS not in inspect.signature(type(module).forward).parameters:
        return None
    seen = 0 if cache is None else cache.get_seq_length()
    return getattr(counting, COUNTING)(ids, counting.padding_idx, seen)


def moved(module: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of `module` on its device, floating-point tensors of its type."""
    dtype, device = module_dtype(module), module_device(module)
    if dtype is None or device is None:
        return arguments
    return {key: _moved(value, dtype, device) for key, value in arguments.items()}


def embedded(module: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of a decoder with embeddings in place of token ids, and positions counted from them.

    A decoder that takes ids looks them up first, and may put pictures among them; that stays on the host, so that all
    decoders take the same inputs.
    """
    ids = arguments.get(IDS)
    if not isinstance(ids, torch.Tensor) or arguments.get(EMBEDDINGS) is not None:
        return arguments
    host: Any = module
    rest = {key: value for key, value in arguments.items() if key != IDS}
    if rest.get(POSITIONS) is None and (positions := _positions(module, ids, rest.get(CACHE_ARGUMENT))) is not None:
        rest[POSITIONS] = positions
    # transformers may have encoded the pictures before, and gives the results beside their pixels.
    encoded: dict[str, Any] = rest.pop(ENCODED, None) or {}
    pixels = rest.get(PIXELS)
    with torch.no_grad():
        embeds = host.get_input_embeddings()(ids)
        if hasattr(module, "get_placeholder_mask") and (encoded or pixels is not None):
            rest.pop(PIXELS, None)
            found: Any = encoded.get("image") or host.get_image_features(pixels, return_dict=True)
            features = found.pooler_output
            mask = host.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
            embeds = embeds.masked_scatter(mask, features.to(embeds))
    return {**rest, EMBEDDINGS: embeds}


def _moved(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Nested tensors moved to a device, floating-point ones cast to the given type."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if is_dict(value):
        return {key: _moved(item, dtype, device) for key, item in value.items()}
    if is_list(value):
        return type(value)(_moved(item, dtype, device) for item in value)
    return value


def absent_inputs(graph: Graph, feeds: dict[str, torch.Tensor], seen: int) -> dict[str, torch.Tensor]:
    """Inputs of a decoder graph that transformers omits when they are trivial.

    A mask that is all ones, or purely causal: i64[B, S] of ones, or bool[B, 1, new, S] if the host creates 4-D masks.
    Deepstack features of a prompt without pictures: zeros.

    Args:
        feeds: the inputs of the call; at least `inputs_embeds: f[B, new, C]`.
        seen: tokens in the cache; S = seen + new.
    """
    embeds = feeds["inputs_embeds"]
    batch, new = embeds.shape[:2]
    absent: dict[str, torch.Tensor] = {}
    for name in graph.inputs:
        root = name.root
        if name in feeds or root not in (MASK, DEEPSTACK):
            continue
        if root == DEEPSTACK:
            absent[name] = torch.zeros_like(embeds)
        elif graph.constants[MASK_AXES] == 2:
            absent[name] = embeds.new_ones(batch, seen + new, dtype=torch.long)
        else:
            open_mask = embeds.new_ones(new, seen + new, dtype=torch.bool)
            open_mask = open_mask.tril(seen) if graph.constants[CAUSAL] else open_mask
            absent[name] = open_mask.expand(batch, 1, -1, -1)
    return absent | _no_pictures(graph, feeds)


def _no_pictures(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros for the inputs of pictures, if a call has none of them."""
    told = [name for name in graph.inputs if f"{ABSENT}.{name}" in graph.constants]
    if not told or any(name in feeds for name in told):
        return {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    nodes: dict[str, fx.Node] = dict(zip(graph.inputs, placeholders, strict=True))
    embeds = feeds[EMBEDDINGS]
    known = dict(zip(_sizes(nodes[EMBEDDINGS]), embeds.shape, strict=True))
    found: dict[str, torch.Tensor] = {}
    for name in told:
        count, sizes = int(graph.constants[f"{ABSENT}.{name}"]), _sizes(nodes[name])
        if name == PICTURES_AT:
            # It has an entry for each token, though a trace may not tie their sizes.
            found[name] = torch.zeros(embeds.shape[:2], dtype=_dtype(nodes[name]), device=embeds.device)
            continue
        # What has a row for every picture of a prompt comes first.
        free = [count * len(embeds) if axis == 0 else count for axis in range(len(sizes))]
        shape = [
            size if isinstance(size, int) else known.get(size, other) for size, other in zip(sizes, free, strict=True)
        ]
        found[name] = torch.zeros(shape, dtype=_dtype(nodes[name]), device=embeds.device)
    return found


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes of an input: numbers, or what is equal for equal symbols."""
    if TYPE in node.meta:
        return [size if size.fixed is None else size.fixed for size in node.meta[TYPE].sizes]
    return [expression(size) for size in node.meta["val"].shape]


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta[TYPE].dtype if TYPE in node.meta else node.meta["val"].dtype


def _scattered(like: torch.Tensor, mask: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Features of the visual tokens `visual: f[V, C]` scattered into the sequence, zero elsewhere: f[B, S, C].

    A dense tensor has the same token axis as hidden states, so a token cut gathers it like them.
    """
    dense = torch.zeros_like(like)
    dense[mask] = visual.to(like)
    return dense


def patch_table(module: torch.nn.Module, sizes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The origin of each patch of a packed sequence: i64[T, 3] of picture, row and column.

    `sizes` are the sizes (height, width) in pixels of pictures that are padded to one frame.
    """
    side = int(_attribute(module, "patch_size"))
    grids = [
        torch.cartesian_prod(torch.tensor([picture]), torch.arange(height // side), torch.arange(width // side))
        for picture, (height, width) in enumerate(sizes)
    ]
    return torch.cat(grids)


def merge_table(module: torch.nn.Module, sizes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Which patches of a packed sequence are merged into one token: i64[T / m^2, m^2], squares of m x m by rows."""
    side, merge = int(_attribute(module, "patch_size")), int(_attribute(module, "spatial_merge_size"))
    squares: list[torch.Tensor] = []
    start = 0
    for pixels in sizes:
        height, width = pixels[0] // side, pixels[1] // side
        grid = torch.arange(start, start + height * width).view(height, width)
        squares.append(grid.unfold(0, merge, merge).unfold(1, merge, merge).reshape(-1, merge * merge))
        start += height * width
    return torch.cat(squares)


def _attribute(module: torch.nn.Module, name: str) -> Any:
    """The first attribute called `name` in a module or below it."""
    return next(getattr(part, name) for part in module.modules() if hasattr(part, name))


TABLES: dict[str, Callable[[torch.nn.Module, Sequence[tuple[int, ...]]], torch.Tensor]] = {
    "patches": patch_table,
    "merged": merge_table,
}
