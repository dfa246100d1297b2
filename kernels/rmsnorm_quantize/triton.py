"""RMS norm and layer norm of a tile in registers, for kernels/transform_quantize/triton.py."""

# Kernel bodies are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def token_mean(x: tl.tensor, C: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """x: f32[R, PAD], 0 in the padding, one token, or TOKENS = R tokens -> f32[TOKENS, 1]."""
    total = tl.sum(x, 1, keep_dims=True)
    if TOKENS == 1:
        total = tl.sum(total, 0, keep_dims=True)
    return tl.div_rn(total, C * 1.0)


@triton.jit
def norm_tile(
    x: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    CENTERED: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """x: f32[R, PAD], 0 in the padding -> f32[R, PAD], 0 in the padding unless the whole token is NaN.

    weight, bias: pointers of the tile's channels. CENTERED: a layer norm instead of an RMS norm.
    """
    if CENTERED:
        x = tl.where(inside, x - token_mean(x, C, TOKENS), 0.0)
    root = tl.sqrt_rn(token_mean(x * x, C, TOKENS) + eps)
    y = tl.div_rn(x, tl.zeros_like(x) + root) * tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        y += tl.load(bias_ptr, mask=inside, other=0.0).to(tl.float32)
    return y
