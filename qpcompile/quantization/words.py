"""Codes of 4 or 8 bits in words of 32, as compressed-tensors packs the rows of a weight and GPTQ its columns.

A word holds 32 / bits codes, each plus half its range, the first in the lowest bits.
"""

from __future__ import annotations

import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.quantize_dynamic.reference import code_range

WORD = 32


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: i8[N, K] of `bits` bits, 4 or 8 -> i32[N, ceil(K bits / 32)]."""
    lowest, highest = code_range(bits)
    if codes.numel() and (codes.amin() < lowest or codes.amax() > highest):
        raise KernelError(
            f"codes from {int(codes.amin())} to {int(codes.amax())} do not fit in {bits} bits",
            where="pack_int32",
            do=f"clamp the codes to [{lowest}, {highest}] before packing",
        )
    rows, columns = codes.shape
    per = WORD // bits
    # Padding is zero bits, which is the lowest code.
    wide = torch.nn.functional.pad(codes.int() - lowest, (0, -columns % per)).view(rows, -1, per)
    words = torch.zeros(wide.shape[:2], dtype=torch.int32)
    for place in range(per):
        words |= wide[:, :, place] << (bits * place)
    return words


def unpack_int32(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """words: i32[N, ceil(K bits / 32)] -> i8[N, K], the inverse of `pack_int32` for K = `columns`."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    wide = (words[:, :, None] >> shifts) & (2**bits - 1)
    return (wide.flatten(1)[:, :columns] + code_range(bits)[0]).to(torch.int8)
