"""The type that sums are computed in before a 4-bit code is made of them.

Back ends add in different orders, so float32 results differ in the last bit, and where x / scale lies next to a tie
the code differs: a few values of every picture, which in the end is a different answer now and then (2 to 4 of 100 on
the Qwen2.5-VL testbed, between the compiled module and onnxruntime). In float64 the orders differ by 1e-16, and
rounded once to float32 they give the same number but for about one value in 10^8.

On a GPU, where float64 is slow and no second back end has to agree, the type is float32.
"""

import torch
from torch import Tensor


def wide_type(x: Tensor) -> torch.dtype:
    """float64 on the CPU (as in ONNX), float32 elsewhere."""
    return torch.float64 if x.device.type == "cpu" else torch.float32
