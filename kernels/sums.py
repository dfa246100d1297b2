"""The type that sums are computed in before a 4-bit code is made of them.

Back ends add in different orders, so float32 results differ in the last bit, and where x / scale lies next to a tie
the code differs: a few values of every picture, which in the end is a different answer now and then (2 to 4 of 100 on
the Qwen2.5-VL testbed, between the compiled module and onnxruntime). In float64 the orders differ by 1e-16, and
rounded once to float32 they give the same number but for about one value in 10^8.

On a GPU, where float64 is slow, and for models in half precision, the type is float32: no second back end has to agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 256


def wide_type(x: Tensor) -> torch.dtype:
    """float64 for float32 and wider on the CPU (as in ONNX), float32 for half precision and elsewhere."""
    return torch.float64 if x.device.type == "cpu" and x.element_size() > 2 else torch.float32


def by_rows(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function` on tensors [..., C] of one shape, a few hundred rows at a time; results are [..., *].

    Its float64 buffers then stay in the cache: two thirds of the time at 2,640 rows of 320 channels.
    """
    leading = tensors[0].shape[:-1]
    if leading.numel() <= ROWS:
        return function(*tensors)
    pieces = zip(*[tensor.reshape(-1, tensor.shape[-1]).split(ROWS) for tensor in tensors], strict=True)
    results = zip(*[function(*piece) for piece in pieces], strict=True)
    return tuple(torch.cat(parts).reshape(*leading, -1) for parts in results)
