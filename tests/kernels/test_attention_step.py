"""qpcompile::attention_step: bit for bit the composition of its parts, near the reference, and in ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.epilogues import CHANGES, arguments_of, epilogue_of
from torch import Tensor

from qpcompile.kernels.attention_step import onnx as translation
from qpcompile.kernels.attention_step import op, reference
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.kernels.transform_quantize.reference import Epilogue

pytestmark = pytest.mark.usefixtures("poison")
ours = torch.ops.qpcompile
# (batch, query heads, key heads, tokens, tokens before, head size): odd factors, one key head for several, no past.
SHAPES = [(2, 6, 2, 1, 17, 20), (1, 4, 4, 1, 1, 64), (3, 3, 1, 2, 70, 6), (1, 7, 1, 1, 0, 2), (0, 2, 2, 1, 5, 8)]
MASKS = ("none", "bool", "float")


def given(
    shape: tuple[int, ...],
    end: Epilogue,
    mask: str = "none",
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, int] = (4, 4),
    *,
    centred: bool = False,
) -> list[Any]:
    """Operands: views of one product, tables, a past, perhaps a centre and a mask that hides the first token."""
    batch, heads, groups, tokens, past, size = shape
    made = torch.Generator().manual_seed(size + past)
    product = (torch.randn(batch, tokens, (heads + 2 * groups) * size, generator=made) * 3).to(dtype)
    parts = product.split((heads * size, groups * size, groups * size), dim=-1)
    views = [part.unflatten(-1, (part.shape[-1] // size, size)).transpose(1, 2) for part in parts]
    angles = torch.randn(1, 1, tokens, size, generator=made) * 9
    cache = [part for each in bits for part in kv_write(torch.randn(batch, groups, past, size, generator=made), each)]
    center = torch.randn(1, groups, 1, size, generator=made).to(dtype) if centred else None
    seen = torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool)
    seen[..., : min(past, 1)] = False
    seen = None if mask == "none" else seen if mask == "bool" else torch.where(seen, 0.5, -torch.inf)
    return [*views, angles.cos(), angles.sin(), True, *bits, *cache, center, seen, 0.3, *arguments_of(end)]


def by_parts(*operands: Any) -> tuple[Tensor, ...]:
    """The operators that it fuses."""
    written, (mask, scale, *end) = ours.rope_kv_append(*operands[:13]), operands[13:]
    y = ours.attention_kv(*written, mask, scale, *operands[6:8]).transpose(1, 2).flatten(2)
    return *ours.transform_quantize(y.float().to(y.dtype), *end), *written[1:]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_op_is_the_composition(shape: tuple[int, ...], change: str, mask: str, dtype: torch.dtype) -> None:
    more = mask == "float"
    end = epilogue_of(shape[1] * shape[5], change, scaled=more, shifted=more, bits=8 if more else 4)
    operands = given(shape, end, mask, dtype, (8, 4) if more else (4, 4), centred=more)
    found = ours.attention_step(*operands)
    assert same(found, by_parts(*operands))
    assert found[0].shape == (shape[0], shape[3], shape[1] * shape[5])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_op_is_the_reference(shape: tuple[int, ...]) -> None:
    """In float64 code for code; in float32 next to a tie of codes or values another one may be taken."""
    operands = given(shape, epilogue_of(shape[1] * shape[5], "rotated", shifted=True), "bool", torch.float64)
    assert same(ours.attention_step(*operands), reference.attention_step(*operands))


@pytest.mark.parametrize("group_size", [0, 12])
def test_opcheck(group_size: int) -> None:
    end = epilogue_of(120, "factors", scaled=True, group_size=group_size)
    torch.library.opcheck(op.attention_step, tuple(given(SHAPES[0], end, "bool", centred=True)))


class Step(torch.nn.Module):
    """A step on inputs that an exported graph has, with weights of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = given(SHAPES[0], epilogue_of(120, "rotated", shifted=True, group_size=12), "bool", dtype, (8, 4))
        self.register_buffer("shift", self.plan[19])
        self.past = torch.nn.ParameterList([torch.nn.Parameter(each, requires_grad=False) for each in self.plan[8:12]])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        every = [q, k, v, *self.plan[3:8], *self.past, *self.plan[12:19], self.shift, *self.plan[20:]]
        return ours.attention_step(*every)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_onnx_is_the_op(export_onnx: Any, dtype: torch.dtype) -> None:
    module = Step(dtype)
    inputs = [each.contiguous() for each in module.plan[:3]]
    exported = torch.onnx.export(
        module, tuple(inputs), dynamo=True, opset_version=21, verbose=False,
        custom_translation_table={op.OVERLOAD: translation.attention_step},
    )  # fmt: skip
    assert exported is not None
    found = [torch.as_tensor(each) for each in exported(*inputs)]
    expected = module(*inputs)
    if dtype == torch.float64:
        assert same(tuple(found), expected)
    else:
        assert (found[0].int() - expected[0].int()).abs().max() <= 1
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=0)
