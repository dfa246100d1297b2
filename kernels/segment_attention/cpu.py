"""CPU kernel of segment_attention: the batches of blocks.py, computed by kernels/attention."""

from torch import Tensor

from qpcompile.kernels.attention.cpu import attention
from qpcompile.kernels.segment_attention import blocks
from qpcompile.kernels.segment_attention.rule import RULE


@RULE.checked
def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Shapes as in reference.py."""
    return blocks.segment_attention(q, k, v, cu_seqlens, scale, attention)
