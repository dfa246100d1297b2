"""A tape repeats the recorded calls, on the current content of their tensors."""

import pytest
import torch

from qpcompile.kernels.kv_write.cpu import kv_write
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.native.tape import Tape
from qpcompile.kernels.rope.cpu import rope

pytestmark = pytest.mark.skipif(not native.available(), reason=native.library().problem)


def add(x: torch.Tensor, y: torch.Tensor, level: int | None = None) -> torch.Tensor:
    total = torch.full_like(x, torch.nan)
    native.call("add", x, y, total, level=level)
    return total


@pytest.mark.parametrize("level", range(native.library().level + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_is_torchs(dtype: torch.dtype, level: int) -> None:
    for size in (0, 1, 255, 256, 700):
        x, y = torch.randn(2, size).to(dtype)
        assert torch.equal(add(x, y, level), x + y)
    x = torch.tensor([torch.inf, torch.inf, torch.nan, 3e38, -0.0, 1e-45]).to(dtype)
    y = torch.tensor([1.0, -torch.inf, 0.0, 3e38, 0.0, 1e-45]).to(dtype)
    torch.testing.assert_close(add(x, y, level), x + y, rtol=0, atol=0, equal_nan=True)


def test_append_goes_on_behind() -> None:
    token, room = torch.arange(12.0).view(2, 2, 1, 3), torch.zeros(2, 2, 5, 3)
    with native.noted() as calls:
        native.call("append", token, room, 4, 3, 5, 1)
    tape = Tape(calls)
    for step in (1, 2):
        token += 100
        tape.replay()
        assert torch.equal(room[:, :, 1 + step], token[:, :, 0])
    assert torch.equal(room[:, :, 1], token[:, :, 0] - 200) and not room[:, :, 0].any() and not room[:, :, 4].any()


def test_operators_are_made_again() -> None:
    x, cos, sin = torch.randn(1, 3, 1, 8), torch.randn(8), torch.randn(8)
    plan = RowPlan("plain", x.dtype, 8, clip_ratio=0.9)
    with native.noted() as calls:
        turned = rope(x, cos, sin)
        codes, affine = kv_write(turned, 8)
        q, scale = plan.quantized(turned)
    made = [turned, codes, affine, q, scale]
    assert [each.symbol for each in calls] == ["rope", "kv_write", "rows_f32"]
    tape = Tape(calls)
    for _ in range(2):
        x.normal_()
        tape.replay()
        expected = rope(x, cos, sin)
        assert all(map(torch.equal, made, [expected, *kv_write(expected, 8), *plan.quantized(expected)]))
    assert tape.replays == 2


def test_nothing_is_noted_outside() -> None:
    with native.noted() as calls:
        pass
    add(torch.ones(1), torch.ones(1))
    assert not calls
