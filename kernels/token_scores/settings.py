"""The operands of `qpcompile::token_scores`, whose schema is flat, in groups; `Value` is a tensor or an ONNX value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Attention(Generic[Value]):
    """A layer's attention: q: f[B, H, S, E], k: f[B, Hkv, S, E], mask: as in reference.attention_mass."""

    q: Value
    k: Value
    mask: Value | None
    scale: float


@dataclass(frozen=True)
class Tokens(Generic[Value]):
    """Flags of tokens, bool[B, S]: visual, not padding, and rows T, whose attention counts."""

    visual: Value
    valid: Value
    queries: Value


@dataclass(frozen=True)
class Settings:
    """How scores are computed.

    weights: of (inter, magnitude, intra, residual). normalize, low, high: see normalize.py; low, high: percentiles.
    intra_mean: divide intra by the number of visual queries that see the key.
    rotate, group_size, clip_ratio, bits: of the quantizer whose residual counts; relative: divide it by the token's
    norm.
    sink: see reference.without_sinks, 0 leaves all channels in.
    """

    weights: Sequence[float]
    normalize: str
    low: float
    high: float
    intra_mean: bool
    rotate: bool
    group_size: int
    clip_ratio: float
    bits: int
    relative: bool
    sink: float
