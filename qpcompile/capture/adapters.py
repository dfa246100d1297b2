"""The code of a family that tracing cannot follow, and what stands in for it: the only place that knows families.

An entry is needed only where generic capture cannot know something. Both entries here are for one habit: a Python loop
over pictures whose sizes are Python numbers would fix the number of pictures and their sizes in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers.utils.output_capturing import capture_outputs

from qpcompile.ir.operators import SEGMENT_ATTENTION


@dataclass(frozen=True)
class Adapter:
    """A `forward` that can be traced, and the table (runtime/prepare.py) that it takes in place of `image_sizes`."""

    forward: Callable[..., Any]
    table: str


@contextmanager
def attending_in_segments(cu_seqlens: torch.Tensor) -> Iterator[None]:
    """While tracing: torch's attention is attention inside segments, whatever mask the model's code gives it."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        scale = options.get("scale") or query.shape[-1] ** -0.5
        return SEGMENT_ATTENTION(query, key, value, cu_seqlens, scale)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        yield


def _packed_pictures(self: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any) -> Any:
    """Pixtral's tower; `image_sizes: i64[T, 3]` says picture, row and column of each patch."""
    picture, row, column = image_sizes.unbind(-1)
    patches = self.patch_conv(pixel_values.to(self.patch_conv.weight.dtype))
    packed = self.ln_pre(patches[picture, :, row, column].unsqueeze(0))
    positions = self.patch_positional_embedding(packed, torch.stack([row, column], dim=-1))
    pictures = torch.arange(pixel_values.shape[0] + 1, device=picture.device)
    # Only attention spelled out by the model ("eager") reads the mask; otherwise it is no part of the graph.
    other = picture[:, None] != picture[None, :]
    mask = torch.zeros_like(other, dtype=packed.dtype).masked_fill(other, torch.finfo(packed.dtype).min)
    with attending_in_segments((picture[None, :] < pictures[:, None]).sum(dim=1)):
        return self.transformer(packed, attention_mask=mask[None, None], position_embeddings=positions, **kwargs)


def _merged_patches(self: Any, image_features: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Mistral 3's merger; `image_sizes: i64[T / m^2, m^2]` says which patches become one token, channels first."""
    squares = image_features[image_sizes].transpose(1, 2)
    return self.merging_layer(squares.flatten(1))


ADAPTERS: dict[str, Adapter] = {
    # Pixtral (also the tower of Mistral 3): cuts each picture out of its frame in a loop.
    "PixtralVisionModel": Adapter(capture_outputs(_packed_pictures), "patches"),
    # Mistral 3: merges the patches of each picture in a loop.
    "Mistral3PatchMerger": Adapter(_merged_patches, "merged"),
}


def table_of(module: torch.nn.Module) -> str | None:
    """The table a component takes in place of the sizes of its pictures, if it has an adapter."""
    return next((adapter.table for part in module.modules() if (adapter := ADAPTERS.get(type(part).__name__))), None)


@contextmanager
def traceable(module: torch.nn.Module) -> Iterator[None]:
    """While tracing: the replacements above, and deepstack as a plain sum.

    Decoders with deepstack add features to the visual rows only, through a boolean index whose result has a size
    unknown to the graph. The features come dense (runtime/prepare.py), so a sum is the same. Afterwards `module`
    is as it was: the exporter leaves a `forward` of its own on it.
    """
    own = {key: value for key, value in vars(module).items() if key == "forward"}
    with ExitStack() as stack:
        stack.callback(lambda: vars(module).update(own))
        stack.callback(lambda: vars(module).pop("forward", None))
        for kind in {type(part) for part in module.modules()}:
            if adapter := ADAPTERS.get(kind.__name__):
                stack.enter_context(mock.patch.object(kind, "forward", adapter.forward))
            if hasattr(kind, "_deepstack_process"):
                stack.enter_context(mock.patch.object(kind, "_deepstack_process", _add_deepstack))
        yield


def _add_deepstack(self: Any, hidden: torch.Tensor, _mask: torch.Tensor | None, visual: torch.Tensor) -> torch.Tensor:
    return hidden + visual.to(hidden.dtype)
