"""GPU kernel of kv8_write: the kernel of kv4_write with one code per byte."""

from torch import Tensor

from qpcompile.kernels.kv4_write.triton import kv_write


def kv8_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, D], affine: f32[B, H, S, 2]."""
    return kv_write(x, 255)
