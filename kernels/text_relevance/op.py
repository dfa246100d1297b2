"""`qpcompile::text_relevance`: visual tokens by their cosine with the question. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.text_relevance import reference

WHERE = "qpcompile::text_relevance"


@torch.library.custom_op(WHERE, mutates_args=())
def text_relevance(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> Tensor:
    """hidden: f[B, S, C], visual, valid: bool[B, S], sign: 1 or -1 -> f32[B, S] in 0..1."""
    _check(hidden, visual, valid, sign)
    return reference.text_relevance(hidden, visual, valid, sign)


@text_relevance.register_fake
def _(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> Tensor:
    _check(hidden, visual, valid, sign)
    return hidden.new_empty(visual.shape, dtype=torch.float32)


def _check(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> None:
    ranks = (hidden.dim(), visual.dim(), valid.dim())
    if ranks != (3, 2, 2) or visual.dtype != torch.bool or valid.dtype != torch.bool or sign not in (1, -1):
        raise KernelError(
            f"hidden, visual {visual.dtype} and valid {valid.dtype} have {ranks} dimensions, sign is {sign}",
            where=WHERE,
            do="give hidden f[batch, tokens, width], two masks bool[batch, tokens], and 1 or -1",
        )


OVERLOAD = torch.ops.qpcompile.text_relevance.default
