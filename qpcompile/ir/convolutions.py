"""Convolutions that are matrix products: over patches that do not overlap, im2col only moves elements."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from qpcompile.ir.edit import aten, operands
from qpcompile.ir.shapes import value

CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default)


def is_plain(padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1) -> bool:
    """Whether a convolution has no padding, no dilation and one group; a number holds for all axes."""
    return _all(padding, 0) and _all(dilation, 1) and groups == 1


def cuts_patches(node: fx.Node) -> bool:
    """Whether a convolution is plain, and its stride is the size of its kernel."""
    given = operands(node)
    sides, stride = list(value(given["weight"]).shape[2:]), given["stride"]
    strides = [stride] * len(sides) if isinstance(stride, int) else list(stride)
    return strides == sides and is_plain(given["padding"], given["dilation"], given["groups"])


def _all(given: int | Sequence[int], expected: int) -> bool:
    return given == expected if isinstance(given, int) else set(given) == {expected}
