"""Cases for attention_step in Triton's interpreter; see test_triton_interpreter.py."""

import pytest
import torch
from kernels.epilogues import CHANGES, epilogue_of
from kernels.test_attention_step import given

from qpcompile.kernels.attention_kv.triton import attention_kv
from qpcompile.kernels.attention_step.triton import attention_step
from qpcompile.kernels.rope_kv_write.triton import rope_kv_append
from qpcompile.kernels.transform_quantize.triton import transform_quantize

# (batch, query heads, key heads, tokens, tokens before, head size): several splits, odd sizes, no past, none.
CASES = [
    ((2, 6, 2, 1, 130, 20), "factors"),
    ((1, 3, 1, 2, 70, 6), "none"),
    ((1, 7, 1, 1, 0, 2), "rotated"),
    ((0, 2, 2, 1, 5, 8), "rotated"),
    *(pytest.param((1, 4, 4, 1, 1, 64), change, marks=pytest.mark.slow) for change in CHANGES),
    *(pytest.param((1, 2, 1, 40, 9, 8), change, marks=pytest.mark.slow) for change in CHANGES),
    *(pytest.param((1, 16, 4, 1, 65, 128), change, marks=pytest.mark.slow) for change in CHANGES),
]


@pytest.mark.parametrize(("shape", "change"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_joined_in_one_kernel_is_the_composition(shape: tuple[int, ...], change: str, dtype: torch.dtype) -> None:
    """Of the kernels of its parts: one order of sums, so codes differ next to a tie only."""
    more = change != "rotated"
    group_size = 6 if shape[3] == 2 else 0
    end = epilogue_of(
        shape[1] * shape[5], change, scaled=more, shifted=more, group_size=group_size, bits=8 if more else 4
    )
    operands = given(shape, end, "bool" if more else "float", dtype, (4, 8) if more else (8, 4), centred=more)
    codes, steps, *cache = attention_step(*operands)
    written = rope_kv_append(*operands[:13])
    mask, scale, *epilogue = operands[13:]
    y = attention_kv(*written, mask, scale, *operands[6:8]).transpose(1, 2).flatten(2)
    expected = transform_quantize(y, *epilogue)
    assert all(map(torch.equal, cache, written[1:]))
    near = 2**-9 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(steps, expected[1], rtol=near, atol=0)
    assert not ((codes.int() - expected[0].int()).abs() > 1).any()
    assert (codes != expected[0]).sum() <= 0.02 * codes.numel()


def test_without_a_visible_key_heads_are_zero() -> None:
    operands = given((1, 4, 2, 1, 5, 16), epilogue_of(64, "none"), "bool")
    operands[13] = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    codes, steps, *_ = attention_step(*operands)
    assert not codes.any() and torch.equal(steps, torch.ones(1, 1, 1))
