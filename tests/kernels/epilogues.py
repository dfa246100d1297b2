"""Epilogues of fused quantizers for tests: every transform, with and without scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments

CHANGES = ("none", "rotated", "factors")


def epilogue_of(
    channels: int,
    change: str,
    *,
    scaled: bool = False,
    shifted: bool = False,
    group_size: int = 0,
    clip: float = 0.9,
    bits: int = 4,
) -> Epilogue:
    """A random epilogue. change: one of `CHANGES`; factors are of the sides that are nearest to a square."""
    side = max(each for each in range(1, int(channels**0.5) + 1) if channels % each == 0)
    left, right = (torch.randn(each, each) / each**0.5 for each in (side, channels // side))
    factors = change == "factors"
    return Epilogue(
        torch.rand(channels) + 0.5 if scaled else None,
        change == "rotated",
        left if factors else None,
        right if factors else None,
        torch.randn(channels) if shifted else None,
        group_size,
        clip,
        bits,
    )


def arguments_of(end: Epilogue) -> EpilogueArguments:
    """The operator's last eight arguments."""
    return (end.transform_scale, end.rotate, end.left, end.right, end.shift, end.group_size, end.clip_ratio, end.bits)


class Transforms(torch.nn.Module):
    """The plain form, each transform, and the one with everything."""

    def __init__(self, operator: Any, *first: Any) -> None:
        super().__init__()
        self.operator, self.first = operator, first
        self.ends = [Epilogue()]
        self.ends += [epilogue_of(144, change, scaled=True, shifted=True, group_size=36) for change in CHANGES]
        self.ends += [epilogue_of(144, "rotated", scaled=True, bits=8)]
        # Operands of an exported program are its tensors.
        for place, end in enumerate(self.ends):
            for name, value in vars(end).items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{place}", value)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.results(x)

    def results(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """Those of every epilogue."""
        made: list[Tensor] = []
        for place, end in enumerate(self.ends):
            held = {name: getattr(self, f"{name}_{place}", value) for name, value in vars(end).items()}
            made += self.operator(*sources, *self.first, *arguments_of(Epilogue(**held)))
        return tuple(made)


def check_onnx(export_onnx: Any, module: torch.nn.Module, translations: dict[Any, Any], sources: int = 1) -> None:
    """Summed in float64, rounded once: the same codes on every back end. In float32: but for codes next to a tie."""
    torch.manual_seed(0)  # two libraries' last bits differ: of some inputs so do the codes
    for dtype in (torch.float64, torch.float32):
        exported = export_onnx(module, [torch.randn(2, 5, 144).to(dtype) for _ in range(sources)], translations)
        assert not any("::" in each for each in exported.operators)
        for shape in ((1, 1, 144), (3, 17, 144)):
            inputs = [(torch.randn(shape) * 5).to(dtype) for _ in range(sources)]
            pairs = list(zip(exported(*inputs), module(*inputs), strict=True))
            if dtype == torch.float64:
                assert all(torch.equal(left, right) for left, right in pairs)
                continue
            for (codes, expected), (scale, wanted) in zip(pairs[::2], pairs[1::2], strict=True):
                assert (codes.int() - expected.int()).abs().max() <= 1 and (codes != expected).sum() <= 3
                torch.testing.assert_close(scale, wanted, rtol=1e-5, atol=0)
