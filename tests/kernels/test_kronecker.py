"""kronecker against the full matrix, on sizes that are not powers of two, and through ONNX."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.errors import KernelError
from qpcompile.kernels.hadamard.op import hadamard
from qpcompile.kernels.hadamard.reference import factors
from qpcompile.kernels.kronecker.onnx import kronecker as translation
from qpcompile.kernels.kronecker.op import OVERLOAD, kronecker


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(left=st.integers(1, 7), right=st.integers(1, 7), tokens=st.integers(0, 5), scaled=st.booleans())
def test_is_the_kronecker_product(left: int, right: int, tokens: int, scaled: bool) -> None:
    first, last = made(left, left, seed=1).double(), made(right, right, seed=2).double()
    x, scale = made(2, tokens, left * right), made(left * right, seed=3) if scaled else None
    wide = x.double() if scale is None else x.double() * scale.double()
    expected = wide @ torch.kron(first, last).T
    got = kronecker(x, scale, first.float(), last.T.float())
    assert got.shape == x.shape and torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 8, 72, 144])
def test_equals_hadamard_at_its_factors(channels: int) -> None:
    x, (left, right) = made(3, 5, channels), factors(channels)
    assert torch.equal(kronecker(x, None, left, right), hadamard(x, None))


def test_keeps_the_type() -> None:
    assert kronecker(made(2, 3, 6).bfloat16(), None, torch.eye(2), torch.eye(3)).dtype == torch.bfloat16


@pytest.mark.parametrize(("left", "right"), [((2, 3), (3, 3)), ((2, 2), (4, 4)), ((2,), (3, 3))])
def test_refuses_factors_that_do_not_fit(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match="qpcompile::kronecker, operand"):
        kronecker(torch.ones(1, 6), None, torch.ones(left), torch.ones(right))


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(OVERLOAD, (made(2, 3, 12), made(12), made(3, 3), made(4, 4)))


@pytest.mark.parametrize("scaled", [False, True])
def test_onnx(export_onnx: Callable[..., Any], scaled: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("left", made(3, 3))
            self.register_buffer("right", made(4, 4))
            self.register_buffer("scale", made(12, seed=4) if scaled else None)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.ops.qpcompile.kronecker(x, self.scale, self.left, self.right)

    model, x = Model(), made(2, 5, 12)
    exported = export_onnx(model, [x], {OVERLOAD: translation})
    for tokens in (5, 1, 9):
        other = made(3, tokens, 12, seed=tokens)
        assert torch.allclose(exported(other)[0], model(other), rtol=1e-5, atol=1e-5)
