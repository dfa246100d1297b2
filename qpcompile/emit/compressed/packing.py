"""Codes as the format compressed-tensors stores them, and what it stores beside them.

`pack-quantized`: code + 2^(bits-1), unsigned, 32 / bits of them in an int32, the first in the lowest bits; a row is
padded to whole words. `int-quantized`: codes as int8. Scales are weight / code, as ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qpcompile.quantization.words import pack_int32

PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized: bits of its weight, inputs per scale (0: all of a row), bits of its input (16: as it
    is).
    """

    weight_bits: int
    group_size: int
    input_bits: int

    @property
    def format(self) -> str:
        """The name of the storage: packed without quantized inputs, one byte per code with them, as readers expect."""
        return PACKED if self.input_bits == 16 else PLAIN

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """The scheme as a group of `quantization_config`, for the modules `targets`."""
        per = ("group", self.group_size) if self.group_size else ("channel", None)
        inputs = None if self.input_bits == 16 else _arguments(self.input_bits, "token", None, dynamic=True)
        return {
            "targets": targets,
            "weights": _arguments(self.weight_bits, *per, dynamic=False),
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def _arguments(bits: int, strategy: str, group_size: int | None, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def stored(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Parameter of a linear -> tensor, as the format stores codes: i8[N, K] and scale: f32[N, G]."""
    if scheme.format == PLAIN:
        return {"weight": codes, "weight_scale": scale}
    return {
        "weight_packed": pack_int32(codes, scheme.weight_bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
