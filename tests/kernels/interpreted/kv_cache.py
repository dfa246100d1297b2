"""Cases for the kernels of the cache in Triton's interpreter; see test_triton_interpreter.py."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.kv_read import reference as read
from qpcompile.kernels.kv_read import triton as read_kernels
from qpcompile.kernels.kv_write import reference as write
from qpcompile.kernels.kv_write import triton as write_kernels

SHAPES = [(1, 2, 0, 8), (1, 1, 1, 1), (2, 3, 5, 63), (1, 2, 17, 64), (2, 1, 33, 80), (1, 2, 3, 128), (1, 1, 2, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cache(*shape: int) -> Tensor:
    """Keys with a token of zeros, one above and one below zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., :1, :] = 0
    x[..., 1:2, :] = x[..., 1:2, :].abs() + 1
    x[..., 2:3, :] = -x[..., 2:3, :].abs() - 1
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_references(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x = cache(*shape).to(dtype)
    # As in models: keys are [B, S, H, D] in memory.
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT):
        for bits in write.BITS:
            assert all(map(torch.equal, write_kernels.kv_write(given, bits), write.kv_write(x, bits)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_the_references(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x = cache(*shape)
    # The interpreter truncates float32 to bfloat16 where hardware rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0
    for bits in write.BITS:
        operands = *write.kv_write(x, bits), shape[3], bits, dtype
        found, expected = read_kernels.kv_read(*operands), read.kv_read(*operands)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_ties_and_the_last_nibble() -> None:
    # Scale 1 and zero point 7: halves are ties between two codes and round to even.
    x = torch.tensor([-7.0, 8.0, 0.5, 1.5, 2.5, -0.5, -1.5])[None, None, None]
    codes, affine = write_kernels.kv_write(x, 4)
    assert affine.flatten().tolist() == [1.0, 7.0]
    assert codes.flatten().tolist() == [0 | 9 << 4, 15 | 7 << 4, 7 | 5 << 4, 9]


def test_a_poisoned_token_stays_alone() -> None:
    x = torch.ones(1, 1, 20, 16)
    x[0, 0, 3, 9] = torch.nan
    for bits in write.BITS:
        assert write_kernels.kv_write(x, bits)[1].isnan().any(-1).flatten().nonzero().flatten().tolist() == [3]
