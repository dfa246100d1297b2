"""Work by blocks of rows: the numbers of one call, and the layout that fake kernels promise."""

import pytest
import torch

from qpcompile.ir import operators
from qpcompile.kernels.sums import ROWS, by_rows


@pytest.mark.parametrize("rows", [1, 2, 64, ROWS, ROWS + 1, 3 * ROWS])
def test_results_are_contiguous_whatever_the_rows_are(rows: int) -> None:
    x = torch.randn(2, 5, rows).transpose(1, 2)
    found = by_rows(lambda part: (part * 2, part.sum(-1, keepdim=True)), x)
    assert all(part.is_contiguous() for part in found)
    assert torch.equal(found[0], x * 2)
    torch.testing.assert_close(found[1], x.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operators_on_transposed_rows_have_the_layout_of_their_fake_kernels(dtype: torch.dtype) -> None:
    x = torch.randn(8, 64).to(dtype).T
    calls = [
        (operators.ACTIVATION, (x, None, "silu")),
        (operators.HADAMARD, (x, None)),
        (operators.KRONECKER, (x, None, torch.eye(2), torch.eye(4))),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_faketensor",))
        assert operator(*arguments).is_contiguous(), operator
