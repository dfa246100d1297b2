"""Storage of weights. 8-bit codes are stored as they are; 4-bit codes two per byte, in planes, on all back ends.

A row of K codes is split into blocks of 2 P columns, P = 128 where 256 divides K and ceil(K / 2) otherwise (one block,
an odd K padded with a zero code). Byte j of the block that starts at column k holds

    low nibble: q[k + j] + 8, unsigned        high nibble: q[k + P + j], two's complement

so that `byte & 15` and `byte & -16` are int8 operands of a product directly, without a shift and without interleaving
columns.
"""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.quantize_dynamic.reference import code_range

LOWEST, HIGHEST = code_range(4)


def plane_width(in_features: int) -> int:
    """P, the number of bytes in one block of a packed row of K = in_features codes."""
    return 128 if in_features % 256 == 0 else (in_features + 1) // 2


def packed_width(in_features: int) -> int:
    """The number of bytes in a packed row, ceil(K / 2)."""
    return (in_features + 1) // 2


def pack_int4(q: Tensor) -> Tensor:
    """q: i8[N, K] in [-8, 7] -> u8[N, ceil(K / 2)]."""
    if q.numel() and (q.amin() < LOWEST or q.amax() > HIGHEST):
        raise KernelError(
            f"codes from {int(q.amin())} to {int(q.amax())} do not fit in 4 bits",
            where="pack_int4",
            do=f"clamp the codes to [{LOWEST}, {HIGHEST}] before packing",
        )
    rows, in_features = q.shape
    width, plane = packed_width(in_features), plane_width(in_features)
    padded = torch.nn.functional.pad(q, (0, in_features % 2))
    planes = padded.reshape(rows, width // plane, 2, plane)
    low, high = planes[:, :, 0] + 8, planes[:, :, 1]
    return (low | (high << 4)).view(torch.uint8).reshape(rows, width)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """packed: u8[N, ceil(K / 2)] -> i8[N, K], contiguous."""
    (rows, width), plane = packed.shape, plane_width(in_features)
    nibbles = packed.contiguous().view(torch.int8).view(rows, width // plane, plane)
    codes = torch.empty(rows, width // plane, 2, plane, dtype=torch.int8, device=packed.device)
    torch.bitwise_and(nibbles, 15, out=codes[:, :, 0])
    codes[:, :, 0] -= 8
    torch.bitwise_right_shift(nibbles, 4, out=codes[:, :, 1])
    return codes.view(rows, 2 * width)[:, :in_features].contiguous()


def stored_codes(q: Tensor, bits: int) -> Tensor:
    """q: i8[N, K] of `bits` bits -> u8[N, ceil(K / 2)] for 4 bits, q for 8."""
    return pack_int4(q) if bits == 4 else q


def codes_of(stored: Tensor, in_features: int) -> Tensor:
    """The inverse of `stored_codes` -> i8[N, K]; the type tells which it is."""
    return unpack_int4(stored, in_features) if stored.dtype == torch.uint8 else stored
