"""Linear layers in C on 8-bit weights, and on 4-bit ones for any number of prompts, are bit-identical to the reference
on every instruction set of this machine.
"""

import pytest
import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.linear_int import cpu as linear_cpu
from qpcompile.kernels.linear_int import reference as linear
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.native import library as native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled"),
    pytest.mark.usefixtures("poison"),
]
LEVELS = range(native.library().level + 1)
LINEARS = [(1, 3), (33, 7), (96, 40), (256, 65), (512, 5), (2816, 33)]
levels = pytest.mark.parametrize("level", LEVELS, ids=[native.LEVELS[level] for level in LEVELS])


@levels
@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize(("columns", "features"), LINEARS)
def test_linears_of_8_bit_weights_are_the_reference(
    columns: int, features: int, groups: tuple[int, int], level: int
) -> None:
    if columns % max(groups):
        pytest.skip("the groups do not divide the channels")
    torch.manual_seed(columns)
    weight = torch.randint(-128, 128, (features, columns), dtype=torch.int8)
    weight_scale, bias = torch.rand(features, groups[1]), torch.randn(features)
    for tokens in (1, 2, 3, 4, 9, 33):
        q, scale = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8), torch.rand(tokens, groups[0])
        for term, dtype in ((None, torch.float32), (bias, torch.bfloat16)):
            found = linear_cpu._in_c(q, scale, weight, weight_scale, term, dtype, level)
            assert torch.equal(found, linear.linear_int(q, scale, weight, weight_scale, term, dtype))


@levels
@pytest.mark.parametrize("tokens", range(1, 18))
@pytest.mark.parametrize(("columns", "features"), [(30, 5), (128, 4), (256, 67), (300, 33), (512, 64)])
def test_packed_linears_of_any_number_of_prompts(columns: int, features: int, tokens: int, level: int) -> None:
    torch.manual_seed(columns + tokens)
    weight = pack_int4(torch.randint(-8, 8, (features, columns), dtype=torch.int8)), torch.rand(features, 1)
    q, scale = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8), torch.rand(tokens, 1)
    found = linear_cpu._in_c(q, scale, *weight, None, torch.float32, level)
    assert torch.equal(found, linear.linear_int(q, scale, *weight, None, torch.float32))


@levels
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127), (127, -128)])
def test_linears_of_8_bit_weights_do_not_overflow(left: int, right: int, tokens: int, level: int) -> None:
    columns = 1 << 16
    q, weight = torch.full((tokens, columns), left, dtype=torch.int8), torch.full((5, columns), right, dtype=torch.int8)
    found = linear_cpu._in_c(q, torch.ones(tokens, 1), weight, torch.ones(5, 1), None, torch.float32, level)
    assert torch.equal(found, torch.full((tokens, 5), float(left * right * columns)))
    with pytest.raises(KernelError, match="columns is 65537"):
        linear_cpu._in_c(
            q.new_zeros(1, columns + 1),
            torch.ones(1, 1),
            q.new_zeros(1, columns + 1),
            torch.ones(1, 1),
            None,
            torch.float32,
            level,
        )
