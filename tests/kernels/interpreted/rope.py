"""Cases for rope in Triton's interpreter; see test_triton_interpreter.py."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.rope import reference
from qpcompile.kernels.rope.triton import rope

SHAPES = [
    ((2, 3, 17, 8), (1, 1, 17, 8)),
    ((63, 3, 80), (63, 1, 80)),
    ((2, 1, 5, 128), (2, 1, 5, 128)),
    ((1, 1, 1, 2), (1, 1, 1, 2)),
    ((1, 2, 0, 8), (1, 1, 0, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_is_the_reference(shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, cos, sin = torch.randn(shapes[0]).to(dtype), torch.randn(shapes[1]), torch.randn(shapes[1])
    # As in models: queries with heads and tokens transposed.
    given: list[Tensor] = [x, x.transpose(-3, -2).contiguous().transpose(-3, -2), x.mT.contiguous().mT]
    # The interpreter truncates float32 to bfloat16 where hardware rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0
    for each in given:
        torch.testing.assert_close(rope(each, cos, sin), reference.rope(x, cos, sin), rtol=tolerance, atol=0)
