"""Activation functions and gates of a tile in registers, for kernels/transform_quantize/triton.py."""

# Kernel bodies are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def activation_tile(x: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    """x: f32[R, PAD] -> f32[R, PAD]."""
    if FUNCTION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif FUNCTION == "gelu_sigmoid":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif FUNCTION == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2 u)); 2 sqrt(2 / pi) = 1.59...
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y
