"""Patch and token embeddings in fast graphs (graphs.py).

patches   conv3d(%x, W, b) of pre-extracted patches of the kernel's size (im2col)    ->  linear(%x, W', b)
tokens    embedding(W, %ids)                                    ->  embedding_16, a table of 16 bits per number
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator, opset21
from torch import fx

from qpcompile.emit.onnx.edit import calls, put
from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.wrap import Part
from qpcompile.ir.convolutions import CONVOLUTIONS, is_plain
from qpcompile.ir.edit import aten, get_tensor, operands, set_tensor
from qpcompile.ir.shapes import value

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export

Tensor = torch.Tensor


def patches_in_one(part: Part) -> None:
    """Replace convolutions whose kernel covers the whole input by matrix products."""
    for node in calls(part, *CONVOLUTIONS):
        given = operands(node)
        x, weight = given["input"], given["weight"]
        if weight.op != "get_attr" or not is_plain(given["padding"], given["dilation"], given["groups"]):
            continue
        kernel = get_tensor(part.module, str(weight.target))
        if kernel.shape[1:] != value(x).shape[1:]:
            continue
        name = f"{weight.target}_rows"
        set_tensor(part.module, name, kernel.detach().flatten(1))
        with part.module.graph.inserting_before(node):
            stored = part.module.graph.get_attr(name)
        rows = put(part, node, aten.reshape.default, x, [-1, kernel[0].numel()], like=node)
        made = put(part, node, aten.linear.default, rows, stored, given["bias"], like=node)
        sizes = [-1, len(kernel), *[1] * (value(x).dim() - 2)]
        node.replace_all_uses_with(put(part, node, aten.reshape.default, made, sizes, like=node))


def tokens_in_16_bits(part: Part) -> None:
    """Store token embeddings in 16 bits; 8-bit codes and their scales are unchanged."""
    for node in calls(part, aten.embedding.default):
        weight, ids, *_ = node.args
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            continue
        table = get_tensor(part.module, str(weight.target))
        if table.is_floating_point() and table.shape[1] > 1:
            new = put(part, node, embedding_16, weight, ids, like=node)
            new.meta["val"] = value(node)
            node.replace_all_uses_with(new)


def embedding_16(weight: Tensor, ids: Tensor) -> Tensor:
    """weight: f[V, C], ids: i64[...] -> f[..., C], from the table stored by `table_16`."""
    return torch.nn.functional.embedding(ids, weight)


def table_16(weight: np.ndarray) -> ir.Tensor:
    """weight: f32[V, C] -> bfloat16 if that is lossless, else float16, which is more precise."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return ir.Tensor((bits >> 16).astype(np.uint16), dtype=ir.DataType.BFLOAT16)
    largest = np.finfo(np.float16).max
    return ir.Tensor(np.clip(weight, -largest, largest).astype(np.float16))


def rows_of_16_bits(weight: Any, ids: Any) -> Any:
    """The translation of `embedding_16`."""
    recorder = evaluator.default()
    assert isinstance(recorder, Recorder)
    stored = recorder.initializer(f"{weight.name}_16", table_16(weight.const_value.numpy()))
    return op.Cast(op.Gather(stored, ids), to=ir.DataType.FLOAT)
