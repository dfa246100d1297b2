"""The linear layers that are measured: the shapes of two models' decoders, and the token counts."""

from dataclasses import dataclass

TOKENS = (1, 16, 64, 208, 256, 640, 3328, 10240)
"""Decoding 1, 16 and 64 answers; prompts of LLaVA pruned and whole, alone and sixteen at once."""


@dataclass(frozen=True)
class Layer:
    """A linear layer [out_features, in_features]; query, key and value are one product, and so are gate and up."""

    model: str
    name: str
    out_features: int
    in_features: int


LAYERS = (
    Layer("LLaVA-1.5-7B", "qkv", 12288, 4096),
    Layer("LLaVA-1.5-7B", "o", 4096, 4096),
    Layer("LLaVA-1.5-7B", "gate_up", 22016, 4096),
    Layer("LLaVA-1.5-7B", "down", 4096, 11008),
    Layer("Qwen2.5-VL-7B", "qkv", 4608, 3584),
    Layer("Qwen2.5-VL-7B", "o", 3584, 3584),
    Layer("Qwen2.5-VL-7B", "gate_up", 37888, 3584),
    Layer("Qwen2.5-VL-7B", "down", 3584, 18944),
)
