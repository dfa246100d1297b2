"""Query selection: text tokens whose attention to visual tokens counts, bool[B, N] at a cut, and the resulting scores.

    after_image   text after a row's first visual token
    last          a row's last token
    raters        of the text after the image, tokens whose share of the image's attention is above the mean:
                  r_t = mean_v softmax_t(<v, t>) on the embeddings that enter the decoder

Source: FastV (arXiv 2403.06764), section 4, for the last token; SparseVLM (arXiv 2410.04417), section 3.2, for raters,
with the order of softmax and mean of its code (Gumpest/SparseVLMs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from qpcompile.ir.attention import Attention
from qpcompile.ir.edit import aten
from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.shapes import value
from qpcompile.pruning.pruner import Point


def after_image(point: Point) -> fx.Node:
    """Valid tokens that are not visual, after the row's first visual one."""
    return _text_after(point, point.visual, point.alive)


def last(point: Point) -> fx.Node:
    """The last valid token."""
    counts = point.call(aten.cumsum.default, point.alive, 1)
    total = point.call(aten.sum.dim_IntList, point.alive, [1], True)
    return point.call(aten.bitwise_and.Tensor, point.alive, point.call(aten.eq.Tensor, counts, total))


def raters(point: Point) -> fx.Node:
    """Text tokens with an above-average share of the image embeddings' attention."""
    embeddings, visual = point.graph.placeholder("inputs_embeds"), point.prompt_visual
    text = _text_after(point, visual, point.valid)
    values = point.call(aten.to.dtype, embeddings, torch.float32)
    products = point.call(aten.matmul.default, values, point.call(aten.transpose.int, values, 1, 2))
    among = point.call(aten.unsqueeze.default, point.call(aten.bitwise_not.default, text), 1)
    hidden = point.call(aten.masked_fill.Scalar, products, among, torch.finfo(torch.float32).min)
    shares = point.call(aten.softmax.int, hidden, -1)
    others = point.call(aten.unsqueeze.default, point.call(aten.bitwise_not.default, visual), 2)
    received = point.call(aten.sum.dim_IntList, point.call(aten.masked_fill.Scalar, shares, others, 0.0), [1])
    # Over the text tokens, shares sum to the number of visual tokens: the mean needs no other sum.
    pictures = point.call(aten.sum.dim_IntList, visual, [1], True)
    texts = point.call(aten.clamp_min.default, point.call(aten.sum.dim_IntList, text, [1], True), 1)
    mean = point.call(aten.div.Tensor, pictures, texts)
    chosen = point.call(aten.bitwise_and.Tensor, text, point.call(aten.gt.Tensor, received, mean))
    # A single text token, or several equal ones: none is above the mean, so all of them are raters.
    none = point.call(aten.bitwise_not.default, point.call(aten.any.dim, chosen, 1, True))
    all_text = point.call(aten.bitwise_and.Tensor, text, none)
    rows = point.call(aten.bitwise_or.Tensor, chosen, all_text)
    return rows if point.kept is None else point.call(aten.gather.default, rows, 1, point.kept)


def _text_after(point: Point, visual: fx.Node, valid: fx.Node) -> fx.Node:
    counted = point.call(aten.bitwise_and.Tensor, visual, valid)
    begun = point.call(aten.gt.Scalar, point.call(aten.cumsum.default, counted, 1), 0)
    text = point.call(aten.bitwise_and.Tensor, valid, point.call(aten.bitwise_not.default, visual))
    return point.call(aten.bitwise_and.Tensor, text, begun)


def attention_from(point: Point, queries: fx.Node, attention: Attention) -> fx.Node:
    """f32[B, N]: the attention that visual tokens get from `queries: bool[B, N]`, mean over heads, sum over queries."""
    hidden = point.hidden()
    return point.call(
        TOKEN_SCORES,
        *(hidden, hidden, attention.query, attention.key, attention.mask, attention.scale),
        *(point.visual, point.alive, queries),
        *([1.0, 0.0, 0.0, 0.0], "none", 0.0, 100.0, False, False, 0, 1.0, 4, False, 0.0),
    )


def received(point: Point, attention: Attention, queries: fx.Node | None) -> fx.Node:
    """f32[B, V]: the attention that keys of another sequence get from `queries: bool[B, S]` (None: from all tokens).

    Mean over heads, sum over queries; attention: query f[B, H, S, D], key f[B, H, V, D].
    """
    query, key = (point.call(aten.to.dtype, node, torch.float32) for node in (attention.query, attention.key))
    scores = point.call(aten.matmul.default, query, point.call(aten.transpose.int, key, 2, 3))
    scores = point.call(aten.mul.Tensor, scores, attention.scale)
    if attention.mask is not None and value(attention.mask).is_floating_point():
        scores = point.call(aten.add.Tensor, scores, attention.mask)
    elif attention.mask is not None:
        hidden = point.call(aten.bitwise_not.default, attention.mask)
        scores = point.call(aten.masked_fill.Scalar, scores, hidden, torch.finfo(torch.float32).min)
    shares = point.call(aten.mean.dim, point.call(aten.softmax.int, scores, -1), [1])
    if queries is not None:
        counted = point.call(aten.unsqueeze.default, point.call(aten.to.dtype, queries, torch.float32), 2)
        shares = point.call(aten.mul.Tensor, shares, counted)
    return point.call(aten.sum.dim_IntList, shares, [1])


QUERIES: dict[str, Callable[[Point], fx.Node]] = {"after_image": after_image, "last": last, "raters": raters}
