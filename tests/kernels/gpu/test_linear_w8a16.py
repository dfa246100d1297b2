"""linear_w8a16 on a GPU against its reference: awkward shapes, the widths of heads, every code."""

import pytest
import torch

from qpcompile.kernels.linear_w8a16 import op, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17, 65, 208])
@pytest.mark.parametrize(("in_features", "out_features"), [(33, 7), (192, 100), (4096, 32003)])
def test_operator_is_the_reference(in_features: int, out_features: int, tokens: int, dtype: torch.dtype) -> None:
    codes, scale = reference.quantize_rows(torch.randn(out_features, in_features, device="cuda") / 64)
    x, bias = torch.randn(tokens, in_features, device="cuda").to(dtype), torch.randn(out_features).to(dtype).cuda()
    for term in (None, bias):
        found = torch.ops.qpcompile.linear_w8a16(x, codes, scale, term)
        expected = x.double() @ (codes * scale.double()).T + (0 if term is None else term.double())
        # float32 sums in a different summation order, then one rounding.
        unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-3}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=2 * unit, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_becomes_its_float(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, device="cuda").to(torch.int8)[None].repeat(64, 1)
    identity = torch.eye(256, dtype=dtype, device="cuda")
    found = torch.ops.qpcompile.linear_w8a16(identity, codes, torch.ones(64, 1, device="cuda"), None)
    assert torch.equal(found.T, codes.to(dtype))


def test_opcheck() -> None:
    codes, scale = reference.quantize_rows(torch.randn(96, 192, device="cuda"))
    torch.library.opcheck(op.linear_w8a16, (torch.randn(2, 3, 192, device="cuda").half(), codes, scale, None))
