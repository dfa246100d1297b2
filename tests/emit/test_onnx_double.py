"""In float64, onnxruntime agrees with torch to a few ulps, also where it has no float64 kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime as ort
import pytest
import torch
from onnx_ir import serde
from torch import fx

from qpcompile.emit.onnx.export import OWN, TORCH
from qpcompile.emit.onnx.translate.nodes import to_onnx
from qpcompile.emit.onnx.wrap import Part

aten = torch.ops.aten
ours = torch.ops.qpcompile
WIDTH = 24


def heads(x: Any) -> Any:
    """[B, S, 24] -> [B, 4, S, 6]."""
    return aten.transpose.int(aten.unflatten.int(x, 2, [4, 6]), 1, 2)


def packed(x: Any) -> Any:
    """The first row alone, as a packed sequence: [1, 4, S, 6]."""
    return heads(aten.slice.Tensor(x, 0, 0, 1))


# name -> function of x: f64[B, S, 24] and pictures: f64[B, 3, 8, 12].
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "gelu": lambda x, p: aten.gelu.default(aten.mul.Tensor(x, 3.0)),
    "silu": lambda x, p: aten.silu.default(aten.mul.Tensor(x, 300.0)),
    "sigmoid gelu": lambda x, p: aten.mul.Tensor(x, aten.sigmoid.default(aten.mul.Tensor(x, 1.702))),
    "tanh gelu": lambda x, p: aten.gelu.default(x, approximate="tanh"),
    "norm": lambda x, p: aten.layer_norm.default(x, [WIDTH], aten.select.int(aten.select.int(x, 0, 0), 0, 0), None),
    "bare norm": lambda x, p: aten.layer_norm.default(x, [WIDTH]),
    "patches": lambda x, p: aten.conv2d.default(p, aten.reshape.default(p, [6, 3, 4, 4]), None, [4, 4]),
    "attention": lambda x, p: aten.scaled_dot_product_attention.default(heads(x), heads(x), heads(x), scale=0.1),
    "segments": lambda x, p: ours.segment_attention.default(
        packed(x), packed(x), packed(x), aten.mul.Tensor(aten.arange.default(2), aten.sym_size.int(x, 1)), 0.1
    ),
    "rms norm": lambda x, p: ours.rmsnorm.default(x, aten.select.int(aten.select.int(x, 0, 0), 0, 0), 1e-6),
}


def example(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)
    return {"x": x, "p": torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64).repeat(1, 1, 1, 2)[:1]}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_is_kept(name: str) -> None:
    traced = fx.symbolic_trace(FUNCTIONS[name])
    output = next(node for node in reversed(traced.graph.nodes) if node.op == "output")
    output.args = ((output.args[0],),)
    traced.recompile()
    part = Part(traced, ("x", "p"), ("y",))
    model = to_onnx("test", part, (example(2, 7), example(3, 9)), (TORCH, OWN))
    # onnxruntime fuses x Sigmoid(a x) to an operator that has no float64 kernel in every one of its builds.
    assert "Sigmoid" not in {node.op_type for node in model.graph}
    session = ort.InferenceSession(serde.serialize_model(model).SerializeToString())
    feeds = example(4, 11)
    found = session.run(None, {entry.name: feeds[entry.name].numpy() for entry in session.get_inputs()})[0]
    (expected,) = traced(**feeds)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-13, atol=1e-14)
