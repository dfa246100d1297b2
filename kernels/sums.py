"""The accumulation type of operators: float64 for float64 rows, float32 for all others.

Back ends use different summation orders, so float32 results differ in the last bit, and where x / scale is next to a
rounding tie the code differs: a few values per picture, which occasionally changes an answer. In float64 the orders
differ by 1e-16, and rounded once to float32 the results are identical except for about one value in 10^8. Graphs of
`numerics: exact` therefore cast to float64 before operators that sum (passes/widen_sums.py); no operator decides that
by itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 256


def wide_type(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for float32 and half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_rows(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply `function` to tensors [..., C] of one shape, a few hundred rows at a time: [..., *] each, contiguous.

    Its buffers then stay in the cache: in float64 it takes two thirds of the time at 2,640 rows of 320 channels.
    """
    leading = tensors[0].shape[:-1]
    if leading.numel() <= ROWS:
        return tuple(part.contiguous() for part in function(*tensors))
    pieces = zip(*[tensor.reshape(-1, tensor.shape[-1]).split(ROWS) for tensor in tensors], strict=True)
    results = zip(*[function(*piece) for piece in pieces], strict=True)
    return tuple(torch.cat(parts).reshape(*leading, -1) for parts in results)
