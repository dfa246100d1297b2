"""linear_int and linear_w4a16 on a GPU against their references: awkward shapes, the models' shapes, every tile."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.linear_int import op, reference
from qpcompile.kernels.linear_int.packing import pack_int4, stored_codes
from qpcompile.kernels.linear_int.tuning import BUCKETS, start_tile
from qpcompile.kernels.linear_w4a16 import reference as half_reference

TOKENS = (0, 1, 5, 16, 17, 63, 64, 65, 208, 640)
AWKWARD = [(1, 5), (17, 33), (255, 1), (256, 65), (300, 40), (1710, 96), (768, 100)]
REAL = [(4096, 4096), (11008, 4096), (3584, 4608), (18944, 3584)]
"""(in_features, out_features)."""


def triton_kernels() -> Any:
    """The module of the kernels; Triton is installed where CUDA is."""
    from qpcompile.kernels.linear_int import triton

    return triton


def codes(*shape: int, bits: int = 4) -> Tensor:
    """i8[shape] over the whole range of `bits` bits, on the GPU."""
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, device="cuda")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("in_features", "out_features"), AWKWARD + REAL)
def test_operator_has_the_bits_of_the_reference(in_features: int, out_features: int, tokens: int) -> None:
    q, weight = codes(tokens, in_features), pack_int4(codes(out_features, in_features))
    scale, weight_scale = torch.rand(tokens, 1, device="cuda"), torch.rand(out_features, 1, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        operands = (q, scale, weight, weight_scale, torch.randn(out_features, device="cuda").to(dtype), dtype, 4)
        found = torch.ops.qpcompile.linear_int(*operands)
        assert torch.equal(found, reference.linear_int(*operands))


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_8_bit_activations(tokens: int, weight_bits: int, groups: int) -> None:
    q, weight = codes(tokens, 4096, bits=8), stored_codes(codes(1000, 4096, bits=weight_bits), weight_bits)
    scale, weight_scale = torch.rand(tokens, groups, device="cuda"), torch.rand(1000, 1, device="cuda")
    operands = (q, scale, weight, weight_scale, None, torch.float32, 8)
    found, expected = torch.ops.qpcompile.linear_int(*operands), reference.linear_int(*operands)
    torch.testing.assert_close(found, expected, rtol=0 if groups == 1 else 1e-5, atol=0 if groups == 1 else 1e-1)


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("limit", BUCKETS)
def test_every_tile_of_the_rule(limit: int, bits: int, tokens: int) -> None:
    q, weight = codes(tokens, 4096, bits=bits), codes(1000, 4096)
    scales, residual = (torch.ones(tokens, 1, device="cuda"), torch.ones(1000, 1, device="cuda")), None
    for split in (1, 3):
        tile = replace(start_tile(132, 1000, 4096, limit), split=split)
        found = triton_kernels().linear_int(
            q, scales[0], pack_int4(weight), scales[1], None, torch.float32, bits, residual, tile=tile
        )
        assert torch.equal(found, reference.integer_product(q, weight).float())


@pytest.mark.parametrize("tokens", [16, 208])
def test_split_columns_give_the_same_bits_every_time(tokens: int) -> None:
    q, weight = codes(tokens, 11008), pack_int4(codes(4096, 11008))
    scale, weight_scale = torch.rand(tokens, 1, device="cuda"), torch.rand(4096, 1, device="cuda")
    operands = (q, scale, weight, weight_scale, None, torch.bfloat16, 4)
    first = torch.ops.qpcompile.linear_int(*operands)
    assert all(torch.equal(torch.ops.qpcompile.linear_int(*operands), first) for _ in range(200))


def test_residual_has_the_bits_of_an_operator_of_its_own() -> None:
    q, weight, residual = codes(65, 512), pack_int4(codes(96, 512)), torch.randn(65, 96, device="cuda").bfloat16()
    operands = (torch.rand(65, 1, device="cuda"), weight, torch.rand(96, 1, device="cuda"), None, torch.bfloat16)
    found = triton_kernels().linear_int(q, *operands, 4, residual)
    assert torch.equal(found, reference.linear_int(q, *operands) + residual)


@pytest.mark.parametrize(("groups", "weight_groups"), [(32, 32), (1, 32), (32, 1)])
@pytest.mark.parametrize("tokens", [1, 17, 208])
def test_groups(tokens: int, groups: int, weight_groups: int) -> None:
    q, weight = codes(tokens, 4096), pack_int4(codes(96, 4096))
    scale, weight_scale = torch.rand(tokens, groups, device="cuda"), torch.rand(96, weight_groups, device="cuda")
    operands = (q, scale, weight, weight_scale, None, torch.float32, 4)
    found = torch.ops.qpcompile.linear_int(*operands)
    torch.testing.assert_close(found, reference.linear_int(*operands), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 100), (2048, 512)])
def test_float_activations(in_features: int, out_features: int, tokens: int, groups: int, dtype: torch.dtype) -> None:
    weight, weight_scale = pack_int4(codes(out_features, in_features)), torch.rand(out_features, groups).cuda() / 64
    x, bias = torch.randn(tokens, in_features, device="cuda").to(dtype), torch.randn(out_features).to(dtype).cuda()
    found = torch.ops.qpcompile.linear_w4a16(x, weight, weight_scale, bias)
    expected = half_reference.linear_w4a16(x.cpu(), weight.cpu(), weight_scale.cpu(), bias.cpu()).cuda()
    # float32 sums in a different summation order, then one rounding to half precision.
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found, expected, rtol=2 * unit, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_nibble_becomes_its_float(dtype: torch.dtype) -> None:
    weight = torch.arange(-8, 8, dtype=torch.int8, device="cuda").repeat(16)[None].repeat(64, 1)
    identity = torch.eye(256, dtype=dtype, device="cuda")
    found = torch.ops.qpcompile.linear_w4a16(identity, pack_int4(weight), torch.ones(64, 1, device="cuda"), None)
    assert torch.equal(found.T, weight.to(dtype))


def test_opcheck() -> None:
    operands = (codes(2, 3, 512), torch.rand(2, 3, 1, device="cuda"), pack_int4(codes(96, 512)))
    torch.library.opcheck(op.linear_int, (*operands, torch.rand(96, 1, device="cuda"), None, torch.bfloat16, 4))


def test_a_captured_call_replays() -> None:
    q, weight = codes(1, 4096), pack_int4(codes(4096, 4096))
    operands = (torch.ones(1, 1, device="cuda"), weight, torch.ones(4096, 1, device="cuda"), None, torch.float32, 4)
    torch.ops.qpcompile.linear_int(q, *operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.qpcompile.linear_int(q, *operands)
    for _ in range(3):
        q.copy_(codes(1, 4096))
        graph.replay()
        assert torch.equal(y, reference.linear_int(q, *operands))
