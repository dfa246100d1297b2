"""Every operator with a Triton kernel runs on a GPU, and equals the reference where a probe compares them."""

from pathlib import Path

import pytest
import torch

import qpcompile
from qpcompile.cli.probes import PROBES

KERNELS = sorted(path.parent.name for path in (Path(qpcompile.__file__).parent / "kernels").glob("*/triton.py"))


@pytest.mark.parametrize("name", KERNELS)
def test_probe(name: str) -> None:
    pair = PROBES[name](torch.device("cuda"))
    torch.cuda.synchronize()
    assert pair is None or torch.equal(*pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"), [(0, 4, 0), (17, 63, 9), (208, 4096, 0), (65, 11008, 128)]
)
def test_quantize_dynamic(tokens: int, channels: int, group_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, channels, device="cuda").to(dtype)
    found = torch.ops.qpcompile.quantize_dynamic(x, group_size, 0.9, 4)
    expected = torch.ops.qpcompile.quantize_dynamic(x.cpu(), group_size, 0.9, 4)
    assert all(torch.equal(left.cpu(), right) for left, right in zip(found, expected, strict=True))
