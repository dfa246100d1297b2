"""Minimal decoders that read states through cross-attention: of an encoder's prompt, or of several pictures."""

from __future__ import annotations

import functools

import torch
from programs import traced
from torch import Tensor, nn

from qpcompile.ir.edit import clone
from qpcompile.ir.program import DECODE, PREFILL, Graph
from qpcompile.runtime.prepare import PICTURES, STATES_OF

WIDTH, CHANNELS = 8, 6
CACHED = tuple(f"past_states.{layer}.cross.{part}" for layer in (0, 1) for part in ("key", "value"))


class Cross(nn.Module):
    """One head of attention over states; with `numbered` keys depend on the states' numbers."""

    def __init__(self, numbered: bool) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(CHANNELS, WIDTH, bias=False) for _ in range(2))
        self.numbered = numbered

    def store(self, states: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        key, value = (part(states).view(rows, -1, 1, WIDTH).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        return (key + torch.arange(key.shape[2])[:, None] if self.numbered else key), value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        found = nn.functional.scaled_dot_product_attention(self.q_proj(x)[:, None], key, value, attn_mask=mask)
        return x + self.o_proj(found[:, 0])


class Layer(nn.Module):
    """Cross-attention, called as layers of decoders are."""

    def __init__(self, numbered: bool) -> None:
        super().__init__()
        self.cross_attn = Cross(numbered)

    def forward(
        self, x: Tensor, states: Tensor | None, cached: tuple[Tensor, ...], mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        key, value = self.cross_attn.store(states, x.shape[0]) if states is not None else cached
        return self.cross_attn(x, key, value, mask), key, value


def wide_mask(mask: Tensor, tokens: int) -> Tensor:
    """bool[B, 1, S, V] of i64[B, V], written by index as transformers does."""
    rows, count = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
    return mask.bool()[rows[:, None], count[None]][:, None, None].expand(-1, -1, tokens, -1)


class Decoder(nn.Module):
    """Two layers on embeddings and states f[B, V, C] with a mask i64[B, V], or with none."""

    def __init__(self, numbered: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(numbered) for _ in range(2)])

    def run(
        self, x: Tensor, states: Tensor | None, cached: tuple[Tensor, ...], mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, *new = layer(x, states, cached[2 * number : 2 * number + 2], mask)
            kept += new
        return x, *kept


class Prefill(Decoder):
    def forward(self, inputs_embeds: Tensor, states: Tensor, states_mask: Tensor) -> tuple[Tensor, ...]:
        return self.run(inputs_embeds, states, (), wide_mask(states_mask, inputs_embeds.shape[1]))


class Unmasked(Decoder):
    def forward(self, inputs_embeds: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        return self.run(inputs_embeds, states, (), None)


class Pictures(Decoder):
    """States of several pictures of a row, f[B * n, P, C], and what each token sees of them, f[B, 1, S, n * P]."""

    def forward(self, inputs_embeds: Tensor, states: Tensor, states_mask: Tensor) -> tuple[Tensor, ...]:
        return self.run(inputs_embeds, states, (), states_mask)


class Pixels(Decoder):
    """States are computed from pixels f[B, n, P, C], and returned; a mask i64[B, S, n] says which pictures are seen."""

    def __init__(self, numbered: bool = False) -> None:
        super().__init__(numbered)
        self.tower = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, inputs_embeds: Tensor, pixel_values: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        return side_by_side(self, inputs_embeds, self.tower(pixel_values), seen)


def side_by_side(decoder: Decoder, x: Tensor, states: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    """What every step does: pictures side by side, and a mask with an entry for each of their states."""
    rows, pictures, size, _ = states.shape
    wide = seen[..., None].expand(-1, -1, -1, size).reshape(rows, seen.shape[1], -1)
    mask = torch.where(wide[:, None].bool(), 0.0, torch.finfo(torch.float32).min)
    flat = states.view(rows, pictures * size, CHANNELS)
    return decoder.run(x, flat, (), mask)[0], flat.view(rows, pictures, size, CHANNELS)


class PixelsDecode(Decoder):
    """A step of such a decoder, on the states that were returned."""

    def forward(self, inputs_embeds: Tensor, encoded: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        return side_by_side(self, inputs_embeds, encoded, seen)


class Decode(Decoder):
    def forward(
        self,
        inputs_embeds: Tensor,
        states_mask: Tensor,
        past_states_0_cross_key: Tensor,
        past_states_0_cross_value: Tensor,
        past_states_1_cross_key: Tensor,
        past_states_1_cross_value: Tensor,
    ) -> tuple[Tensor, ...]:
        cached = (
            past_states_0_cross_key,
            past_states_0_cross_value,
            past_states_1_cross_key,
            past_states_1_cross_value,
        )
        for each in cached:
            torch._check(each.shape[2] == states_mask.shape[-1])
        mask = wide_mask(states_mask, 1) if states_mask.ndim == 2 else states_mask
        return self.run(inputs_embeds, None, cached, mask)


@functools.cache
def _prefill(kind: type[Decoder], numbered: bool) -> Graph:
    inputs = {"inputs_embeds": torch.ones(2, 5, WIDTH), "states": torch.ones(2, 7, CHANNELS)}
    axes: dict[str, tuple[int, ...]] = {}
    if kind is Prefill:
        inputs["states_mask"] = torch.ones(2, 7, dtype=torch.long)
    if kind is Pictures:
        inputs["states"] = torch.ones(6, 4, CHANNELS)
        inputs["states_mask"], axes["states_mask"] = torch.zeros(2, 1, 5, 12), (0, 2, 3)
    return traced(kind(numbered), inputs, ("hidden", *CACHED), PREFILL, axes=axes)


@functools.cache
def _decode(axes: int) -> Graph:
    mask = torch.ones(2, 9, dtype=torch.long) if axes == 2 else torch.zeros(2, 1, 1, 9)
    inputs = {"inputs_embeds": torch.ones(2, 1, WIDTH), "states_mask": mask}
    inputs |= {name: torch.ones(2, 1, 9, WIDTH) for name in CACHED}
    free = dict.fromkeys(CACHED, (0, 2)) | {"inputs_embeds": (0,), "states_mask": (0, axes - 1)}
    return traced(Decode(), inputs, ("hidden", *CACHED), DECODE, axes=free)


def states_prefill(of: str | None, kind: type[Decoder] = Prefill, numbered: bool = False) -> Graph:
    """A traced prefill; `of` says what its states are of (None: unknown)."""
    graph = clone(_prefill(kind, numbered))
    graph.constants |= {} if of is None else {STATES_OF: of}
    return graph


def pixels_graphs(numbered: bool = False) -> tuple[Graph, Graph]:
    """The traced prefill and decode of a decoder that computes its states itself."""
    given = {"inputs_embeds": torch.ones(2, 5, WIDTH), "pixel_values": torch.ones(2, 3, 4, CHANNELS)}
    given["seen"] = torch.ones(2, 5, 3, dtype=torch.long)
    axes = {"seen": (0, 1, 2)}
    prefill = traced(Pixels(numbered), given, ("hidden", "encoded"), PREFILL, axes=axes)
    prefill.constants[STATES_OF] = PICTURES
    step = {
        "inputs_embeds": torch.ones(2, 1, WIDTH),
        "encoded": torch.ones(2, 3, 4, CHANNELS),
        "seen": given["seen"][:, :1],
    }
    decode = traced(PixelsDecode(), step, ("hidden", "encoded"), DECODE, axes={"inputs_embeds": (0,), "seen": (0, 2)})
    return prefill, decode


def states_decode(axes: int = 2) -> Graph:
    """The traced decode with the same weights, and a mask of so many axes."""
    return clone(_decode(axes))
