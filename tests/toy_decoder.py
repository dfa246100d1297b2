"""A minimal decoder with all patterns that passes match: norms, grouped-query attention, a gated product, a cache."""

from __future__ import annotations

import functools

import torch
from programs import traced
from torch import Tensor, nn

from qpcompile.ir.edit import clone
from qpcompile.ir.program import DECODE, PREFILL, Graph

HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 1, 4, 8
EPS = 1e-6


class Norm(nn.Module):
    """The RMS norm as transformers writes it."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, 12, bias=False)
        self.up_proj = nn.Linear(HIDDEN, 12, bias=False)
        self.down_proj = nn.Linear(12, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Two query heads on one key-value head; `is_causal` instead of a mask where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * WIDTH, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * WIDTH, bias=False)
        self.o_proj = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        rows, length, _ = x.shape
        query = self.q_proj(x).view(rows, length, HEADS, WIDTH).transpose(1, 2)
        key = self.k_proj(x).view(rows, length, KV_HEADS, WIDTH).transpose(1, 2)
        value = self.v_proj(x).view(rows, length, KV_HEADS, WIDTH).transpose(1, 2)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        wide = [part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value)]
        found = nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(found.transpose(1, 2).reshape(rows, length, HEADS * WIDTH)), key, value


class Layer(nn.Module):
    """Attention, and if `gated` a norm before and a gated product after it."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.norms = nn.ModuleList([Norm(), Norm()] if gated else [])
        self.mlp = Mlp() if gated else None

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        found, key, value = self.self_attn(self.norms[0](x) if self.norms else x, mask, past)
        x = x + found
        if self.mlp is not None:
            x = x + self.mlp(self.norms[1](x))
        return x, key, value


class Prefill(nn.Module):
    """Embeddings and a padding mask -> hidden states, then a key and a value per layer."""

    def __init__(self, count: int = 2, gated: bool = False, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(gated) for _ in range(count)])
        self.masked = masked

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        mask = None
        if self.masked:
            position = torch.arange(inputs_embeds.shape[1])
            mask = (position[None, :] <= position[:, None])[None, None] & attention_mask[:, None, None, :]
        x, cache = inputs_embeds, []
        for layer in self.layers:
            x, *new = layer(x, mask, None)
            cache += new
        return x, *cache


class Decode(nn.Module):
    """One token on top of the caches of two layers."""

    def __init__(self, prefill: Prefill) -> None:
        super().__init__()
        self.layers = prefill.layers

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        past_key_values_0_key: Tensor,
        past_key_values_0_value: Tensor,
        past_key_values_1_key: Tensor,
        past_key_values_1_value: Tensor,
    ) -> tuple[Tensor, ...]:
        for past in (past_key_values_0_key, past_key_values_0_value, past_key_values_1_key, past_key_values_1_value):
            torch._check(attention_mask.shape[1] == past.shape[2] + 1)
        x, cache = inputs_embeds, []
        pasts = ((past_key_values_0_key, past_key_values_0_value), (past_key_values_1_key, past_key_values_1_value))
        for layer, past in zip(self.layers, pasts, strict=True):
            x, *new = layer(x, attention_mask[:, None, None, :], past)
            cache += new
        return x, *cache


def cache_names(layers: int) -> tuple[str, ...]:
    """Names of the cache tensors of a decoder with `layers` layers."""
    return tuple(f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))


@functools.cache
def _prefill(count: int, gated: bool, masked: bool) -> Graph:
    inputs = {"inputs_embeds": torch.ones(2, 5, HIDDEN), "attention_mask": torch.ones(2, 5, dtype=torch.bool)}
    return traced(Prefill(count, gated, masked), inputs, ("hidden", *cache_names(count)), PREFILL)


@functools.cache
def _decode(gated: bool) -> Graph:
    inputs = {"inputs_embeds": torch.ones(2, 1, HIDDEN), "attention_mask": torch.ones(2, 7, dtype=torch.bool)}
    inputs |= {name: torch.ones(2, KV_HEADS, 6, WIDTH) for name in cache_names(2)}
    axes = dict.fromkeys(cache_names(2), (0, 2)) | {"inputs_embeds": (0,)}
    return traced(Decode(Prefill(2, gated)), inputs, ("hidden", *cache_names(2)), DECODE, axes=axes)


def prefill_graph(count: int = 2, gated: bool = False, masked: bool = True) -> Graph:
    """The traced prefill of a toy decoder; traced once, a copy per call."""
    return clone(_prefill(count, gated, masked))


def decode_graph(gated: bool = False) -> Graph:
    """The traced decode of the toy decoder of two layers with the same weights."""
    return clone(_decode(gated))


def toy_feeds(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a toy prefill; the first row is padded on the left by one token."""
    made = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, 0] = False
    return {"inputs_embeds": torch.randn(rows, length, HIDDEN, generator=made), "attention_mask": mask}
