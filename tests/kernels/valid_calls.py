"""One valid call of every operator, for tests that mutate them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic

B, S, C, N, H, HKV, D, ROWS = 2, 6, 12, 5, 4, 2, 8, 3


def real(*shape: int) -> Tensor:
    """Deterministic f32 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def flags(*marked: int) -> Tensor:
    """bool[B, S], true at these tokens."""
    made = torch.zeros(B, S, dtype=torch.bool)
    made[:, list(marked)] = True
    return made


def packed() -> tuple[Tensor, Tensor]:
    """u8[N, C / 2] and f32[N, 1]."""
    codes, scale = quantize_dynamic(real(N, C))
    return pack_int4(codes), scale


def packed_experts() -> tuple[Tensor, Tensor]:
    """u8[4, N, C / 2] and f32[4, N, 1]."""
    codes, scale = quantize_dynamic(real(4 * N, C))
    return pack_int4(codes).unflatten(0, (4, N)), scale.unflatten(0, (4, N))


def cache(bits: int) -> tuple[Tensor, Tensor]:
    """u8[B, HKV, S, D bits / 8] and f32[B, HKV, S, 2]."""
    return kv_write(real(B, HKV, S, D), bits)


def heads(tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of new tokens."""
    return real(B, H, tokens, D), real(B, HKV, tokens, D), real(B, HKV, tokens, D)


def epilogue() -> tuple[Any, ...]:
    """Everything that an epilogue may have, but for the rotation."""
    return real(C), False, real(3, 3), real(4, 4), real(C), 4, 0.9, 8


VISUAL, VALID, TEXT = flags(1, 2, 3), flags(*range(S)), flags(4, 5)
BUDGET = torch.full((B,), 2)
SEGMENTS = torch.tensor([0, 2, S])

CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "activation": lambda: (real(B, ROWS, C), real(B, ROWS, C), "gelu"),
    "activation_quantize": lambda: (real(B, ROWS, C), real(B, ROWS, C), "gelu", *epilogue()),
    "attention_kv": lambda: (real(B, H, ROWS, D), *cache(4), *cache(8), None, 0.3, 4, 8, torch.tensor([S])),
    "attention_received": lambda: (real(B, H, S, D), real(B, HKV, S, D), None, 0.3, False),
    "attention_step": lambda: (
        *(*heads(1), real(B, 1, 1, D), real(1, 1, 1, D), True, 8, 4, *cache(8), *cache(4), real(1, HKV, 1, D)),
        *(real(B, 1, 1, S + 1), 0.3, real(H * D), False, real(4, 4), real(8, 8), real(H * D), 4, 0.9, 8),
    ),
    "expert_linear": lambda: (real(ROWS, 1, C), real(4, N, C), torch.tensor([[0, 3], [1, 2], [2, 2]])),
    "expert_linear_a16": lambda: (real(ROWS, 1, C), *packed_experts(), torch.tensor([[0, 3], [1, 2], [2, 2]])),
    "expert_linear_int": lambda: (
        *(*quantize_dynamic(real(ROWS, 1, C)), *packed_experts(), torch.tensor([[0, 3], [1, 2], [2, 2]])),
        *(torch.float32, 4),
    ),
    "channel_delta": lambda: (
        *(real(B, S, H, D), real(B, S, H, D), real(B, S, H, 7), -real(B, S, H, D).abs(), real(B, S, H).sigmoid()),
        real(B, H, D, 7),
    ),
    "gated_delta": lambda: (
        *(real(B, S, H, D), real(B, S, H, D), real(B, S, H, 7), -real(B, S, H).abs(), real(B, S, H).sigmoid()),
        real(B, H, D, 7),
    ),
    "dpp_select": lambda: (real(B, S, C), real(B, S).abs(), VISUAL, BUDGET),
    "farthest_tokens": lambda: (real(B, S, C), VISUAL, BUDGET),
    "fuse_risk": lambda: (real(B, S), real(B, S), VISUAL, 0.5, True, True),
    "hadamard": lambda: (real(B, ROWS, C), real(C)),
    "kronecker": lambda: (real(B, ROWS, C), real(C), real(3, 3), real(4, 4)),
    "kv_read": lambda: (*cache(4), D, 4, torch.float32),
    "kv_write": lambda: (real(B, HKV, S, D), 8),
    "layernorm_quantize": lambda: (real(B, ROWS, C), real(C), real(C), 1e-6, *epilogue()),
    "linear_w4a16": lambda: (real(B, ROWS, C), *packed(), real(N)),
    "linear_int": lambda: (*quantize_dynamic(real(B, ROWS, C)), *packed(), real(N), torch.float32, 4, real(B, ROWS, N)),
    "linear_w8a16": lambda: (real(B, ROWS, C), torch.ones(N, C, dtype=torch.int8), real(N, 1), real(N)),
    "merge_tokens": lambda: (real(B, S, C), real(B, S, D), real(B, S).abs(), VISUAL, TEXT, 2),
    "pivot_tokens": lambda: (real(B, S, C), real(B, HKV, S, D), VISUAL, VALID, BUDGET, 1, 1),
    "quant_stub": lambda: (real(B, ROWS, C),),
    "quantization_risk": lambda: (real(B, S, C), VISUAL, "complex", 4),
    "quantize_dynamic": lambda: (real(B, ROWS, C), 4, 0.9, 8),
    "quantize_static": lambda: (real(B, ROWS, C), real(B, ROWS, 1).abs(), 8),
    "rmsnorm": lambda: (real(B, ROWS, C), real(C), 1e-6),
    "rmsnorm_quantize": lambda: (real(B, ROWS, C), real(C), 1e-6, *epilogue()),
    "rope": lambda: (real(B, H, S, D), real(1, S, D), real(1, S, D)),
    "rope_kv_append": lambda: (*heads(1), real(B, 1, 1, D), real(1, 1, 1, D), True, 8, 4, *cache(8), *cache(4), None),
    "rope_kv_write": lambda: (*heads(S), real(B, 1, S, D), real(1, 1, 1, D), True, 8, 4, real(1, HKV, 1, D)),
    "segment_attention": lambda: (real(1, H, S, D), real(1, HKV, S, D), real(1, HKV, S, 7), SEGMENTS, 0.3),
    "select_tokens": lambda: (real(B, S), 3, BUDGET),
    "simulate_kivi": lambda: (real(B, HKV, S, D), 15, True),
    "simulate_qvlm": lambda: (real(B, ROWS, C), -real(C).abs(), real(C).abs()),
    "spread_tokens": lambda: (real(B, S), VISUAL, BUDGET, 0.5),
    "text_relevance": lambda: (real(B, S, C), VISUAL, VALID, -1),
    "token_scores": lambda: (
        *(real(B, S, C), real(B, S, C), real(B, H, S, D), real(B, HKV, S, D), None, 0.3, VISUAL, VALID, TEXT),
        *([1.0, 0.5, 1.0, 2.0], "percentile", 1.0, 99.0, True, True, 4, 1.0, 8, True, 3.0),
    ),
    "transform_quantize": lambda: (real(B, ROWS, C), *epilogue()),
}
