"""qpcompile::attention_received, the score that pruning methods take from a vision tower."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention_received import pieces

WHERE = "qpcompile::attention_received"


@torch.library.custom_op(WHERE, mutates_args=())
def attention_received(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    """q: f[B, Hq, T, D], k: f[B, Hkv, T, D], cu_seqlens: i[S + 1] with B = 1, or None -> f32[B, T].

    class_token: score by the attention of token 0 of each row, else by that of all tokens of the segment.
    """
    _check(q, k, cu_seqlens, class_token)
    return pieces.attention_received(q, k, cu_seqlens, scale, class_token)


@attention_received.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    _check(q, k, cu_seqlens, class_token)
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32)


def _check(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, class_token: bool) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise KernelError(
            f"queries {list(q.shape)} and keys {list(k.shape)} do not attend to each other",
            where=WHERE,
            do="give [rows, heads, tokens, head size] with query heads a multiple of the key heads",
        )
    if cu_seqlens is not None and (class_token or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point()):
        raise KernelError(
            f"segments are {cu_seqlens.dtype} with {cu_seqlens.dim()} dimensions, class token {class_token}",
            where=WHERE,
            do="give cumulative lengths i[segments + 1] of a packed row, which has no class token",
        )


OVERLOAD = torch.ops.qpcompile.attention_received.default
