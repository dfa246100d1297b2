"""Model-specific replacements for code that cannot be traced: the only place that knows model families.

An entry is needed only where generic capture is impossible. Both entries address the same pattern: a Python loop over
pictures with sizes as Python numbers would specialize the graph to the number and sizes of pictures.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import LinearAttentionLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from qpcompile.ir.operators import CHANNEL_DELTA, EXPERT_LINEAR, GATED_DELTA, SEGMENT_ATTENTION


@dataclass(frozen=True)
class Adapter:
    """A traceable `forward`, and the table (runtime/prepare.py) that it takes instead of `image_sizes`."""

    forward: Callable[..., Any]
    table: str


@contextmanager
def attending_in_segments(cu_seqlens: torch.Tensor) -> Iterator[None]:
    """While tracing: torch's attention becomes block-diagonal attention over segments, ignoring the model's mask."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        scale = options.get("scale") or query.shape[-1] ** -0.5
        return SEGMENT_ATTENTION(query, key, value, cu_seqlens, scale)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        yield


def _experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts of a layer as products per expert, in place of transformers' loop over those that were chosen.

    hidden: f[N, C], index: i64[N, k], the experts of each token, weights: f[N, k] -> f[N, C].
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        matrix = getattr(self, name)
        y = EXPERT_LINEAR(x, matrix.transpose(1, 2) if has("is_transposed") else matrix, index)
        return y + getattr(self, f"{name}_bias")[index] if has("has_bias") else y

    def has(name: str) -> bool:
        return bool(getattr(self, name, name == "has_gate"))  # families with a loop of their own do not say

    inner = linear(hidden.unsqueeze(1), "gate_up_proj" if has("has_gate") else "up_proj")
    inner = self._apply_gate(inner) if has("has_gate") else self.act_fn(inner)
    own = linear(inner, "down_proj")
    own = self.post_expert_norm(own) if has("has_post_expert_norm") else own
    return (own * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def _chosen_experts(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4's experts on the tokens that chose them; transformers multiplies every token by every expert, and those
    that were not chosen by zero.

    hidden_states: f[..., C] -> f[N, C], and the router's logits f[N, E].
    """
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    shares, index = scores.topk(self.top_k, dim=1)
    first, second = (matrix.transpose(1, 2) for matrix in (self.experts.gate_up_proj, self.experts.down_proj))
    gate, up = EXPERT_LINEAR(hidden.unsqueeze(1) * shares.unsqueeze(-1), first, index).chunk(2, dim=-1)
    routed = EXPERT_LINEAR(up * self.experts.act_fn(gate), second, index)
    return self.shared_expert(hidden) + routed.sum(dim=1), logits


def _loops_over_experts(part: torch.nn.Module) -> bool:
    """Whether a module is a family's own loop over experts, with the weights and arguments of transformers' interface.

    What stands in its place is compared with it, like all that is traced.
    """
    weights = [getattr(part, name, None) for name in ("gate_up_proj", "down_proj")]
    stacked = all(isinstance(weight, torch.Tensor) and weight.ndim == 3 for weight in weights)
    taken = list(inspect.signature(type(part).forward).parameters)[2:]
    return stacked and hasattr(part, "_apply_gate") and taken == ["top_k_index", "top_k_weights"]


def _delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A delta rule as one operator, in place of transformers' loop over chunks or tokens.

    query, key: f[B, S, Hk, D], value: f[B, S, H, E], beta: f[B, S, H], initial_state: f[B, H, D, E] or None: zeros;
    g: f[B, S, H], or f[B, S, H, D] where each channel of a key decays at its own rate.
    """
    heads, width = value.shape[2], key.shape[3]
    if key.shape[2] != heads:
        query, key = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (
            (each.float() * (each.float().square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(value.dtype)
            for each in (query, key)
        )
    if initial_state is None:
        initial_state = value.new_zeros((value.shape[0], heads, width, value.shape[3]), dtype=torch.float32)
    rule = GATED_DELTA if g.ndim == 3 else CHANNEL_DELTA
    return rule(query * width**-0.5, key, value, g, beta, initial_state.float())


def _weighted_rows(
    indices: torch.Tensor, table: torch.Tensor, per_sample_weights: torch.Tensor, mode: str = "sum"
) -> torch.Tensor:
    """torch's embedding_bag of bags of equal size, i64[N, k] and f[N, k], as a lookup and a weighted sum: f[N, C]."""
    assert mode == "sum" and indices.ndim == 2
    return (torch.nn.functional.embedding(indices, table) * per_sample_weights.unsqueeze(-1)).sum(dim=1)


def _whole_conv_state(
    self: Any, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
) -> torch.Tensor:
    """A convolution's state of a prompt of any length, in place of transformers' branch on prompts that are shorter.

    conv_states: f[B, C, S]; the state is the last tokens of it after as many zeros, and the convolution is causal.
    """
    kwargs |= {"state_idx": state_idx, "conv_kernel_size": conv_kernel_size}
    if conv_kernel_size is None or self.has_previous_state[state_idx] or self.record_past:
        return _UPDATE_CONV_STATE(self, conv_states, **kwargs)
    _UPDATE_CONV_STATE(self, torch.nn.functional.pad(conv_states, (conv_kernel_size, 0)), **kwargs)
    return conv_states


_UPDATE_CONV_STATE = LinearAttentionLayer.update_conv_state


class _KeepAll(TorchFunctionMode):
    """Keep what a mask along one axis would drop, `x[:, keep]`: the number of what is kept is in no graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            whole = slice(None)
            args = (args[0], tuple(whole if _is_mask(each) else each for each in args[1]))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.ndim == 1


def _whole_pools(pools: Callable[..., Any]) -> Callable[..., Any]:
    """Groups of tokens that an indexer chooses from, as many as a row without padding fills, in place of those that are
    valid in some row: the same where a row has no padding, and else more that are never chosen.
    """

    def pooled(self: Any, packed_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _KeepAll():
            found = pools(self, packed_states)
        whole = packed_states.shape[1] // self.index_kpool
        return tuple(each[:, :whole] for each in found)

    return pooled


def _broadcast_mask(mask_function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A mask by broadcasting, in place of transformers' vmap over its four axes, which a graph cannot hold."""

    def mask(batch: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        found = mask_function(
            batch[:, None, None, None], heads[None, :, None, None], queries[None, None, :, None], keys[None, None, None]
        )
        return found.expand(batch.shape[0], heads.shape[0], queries.shape[0], keys.shape[0])

    return mask


def _packed_pictures(self: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any) -> Any:
    """Pixtral's tower; `image_sizes: i64[T, 3]` holds picture, row and column of each patch."""
    picture, row, column = image_sizes.unbind(-1)
    patches = self.patch_conv(pixel_values.to(self.patch_conv.weight.dtype))
    packed = self.ln_pre(patches[picture, :, row, column].unsqueeze(0))
    positions = self.patch_positional_embedding(packed, torch.stack([row, column], dim=-1))
    pictures = torch.arange(pixel_values.shape[0] + 1, device=picture.device)
    # Only eager attention reads the mask; otherwise it is not part of the graph.
    other = picture[:, None] != picture[None, :]
    mask = torch.zeros_like(other, dtype=packed.dtype).masked_fill(other, torch.finfo(packed.dtype).min)
    with attending_in_segments((picture[None, :] < pictures[:, None]).sum(dim=1)):
        return self.transformer(packed, attention_mask=mask[None, None], position_embeddings=positions, **kwargs)


def _merged_patches(self: Any, image_features: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Mistral 3's merger; `image_sizes: i64[T / m^2, m^2]` lists the patches merged into each token, channels first."""
    squares = image_features[image_sizes].transpose(1, 2)
    return self.merging_layer(squares.flatten(1))


ADAPTERS: dict[str, Adapter] = {
    # Pixtral (also the tower of Mistral 3): crops each picture from its frame in a loop.
    "PixtralVisionModel": Adapter(capture_outputs(_packed_pictures), "patches"),
    # Mistral 3: merges the patches of each picture in a loop.
    "Mistral3PatchMerger": Adapter(_merged_patches, "merged"),
}


# Layers that run all experts on all tokens, by the name of their class.
MIXTURES: dict[str, Callable[..., Any]] = {"Llama4TextMoe": _chosen_experts}

# Methods that are wrapped while tracing, by name.
METHODS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {"get_pooled_states": _whole_pools}

# Functions of the modules of families that are replaced while tracing, by name.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _delta,
    "torch_recurrent_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "recurrent_kimi_delta_attention": _delta,
}


def table_of(module: torch.nn.Module) -> str | None:
    """The table a component takes instead of picture sizes, if it has an adapter."""
    return next((adapter.table for part in module.modules() if (adapter := ADAPTERS.get(type(part).__name__))), None)


@contextmanager
def traceable(module: torch.nn.Module, adapted: bool = True) -> Iterator[None]:
    """While tracing: the replacements above, and deepstack as a plain sum.

    Decoders with deepstack add features to the visual rows only, through a boolean index with a data-dependent size.
    The features are passed dense (runtime/prepare.py), so an add is equivalent. `module` is restored afterwards: the
    exporter leaves its own `forward` on it. adapted: whether ADAPTERS apply; they take tables in place of sizes.
    """
    own = {key: value for key, value in vars(module).items() if key == "forward"}
    with ExitStack() as stack:
        stack.callback(lambda: vars(module).update(own))
        stack.callback(lambda: vars(module).pop("forward", None))
        stack.enter_context(mock.patch.object(ALL_EXPERTS_FUNCTIONS, "get_interface", lambda *_: _experts))
        stack.enter_context(mock.patch("torch.nn.functional.embedding_bag", _weighted_rows))
        stack.enter_context(mock.patch("transformers.masking_utils._vmap_expansion_sdpa", _broadcast_mask))
        stack.enter_context(mock.patch.object(LinearAttentionLayer, "update_conv_state", _whole_conv_state))
        # Only vmap needs it: a lookup is an operator of its own there.
        stack.enter_context(mock.patch("transformers.masking_utils.TransformGetItemToIndex", nullcontext))
        kinds = {type(part) for part in module.modules()}
        looping = {type(part) for part in module.modules() if _loops_over_experts(part)}
        for home in {sys.modules[kind.__module__] for kind in kinds}:
            for name in FUNCTIONS.keys() & vars(home).keys():
                stack.enter_context(mock.patch.object(home, name, FUNCTIONS[name]))
        for kind in kinds:
            if adapted and (adapter := ADAPTERS.get(kind.__name__)):
                stack.enter_context(mock.patch.object(kind, "forward", adapter.forward))
            if mixture := MIXTURES.get(kind.__name__):
                stack.enter_context(mock.patch.object(kind, "forward", mixture))
            if kind in looping:
                stack.enter_context(mock.patch.object(kind, "forward", _experts))
            for name in METHODS.keys() & vars(kind).keys():
                stack.enter_context(mock.patch.object(kind, name, METHODS[name](vars(kind)[name])))
            if hasattr(kind, "_deepstack_process"):
                stack.enter_context(mock.patch.object(kind, "_deepstack_process", _add_deepstack))
        yield


def _add_deepstack(self: Any, hidden: torch.Tensor, _mask: torch.Tensor | None, visual: torch.Tensor) -> torch.Tensor:
    return hidden + visual.to(hidden.dtype)
