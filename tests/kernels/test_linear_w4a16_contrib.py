"""linear_w4a16 in onnxruntime's own operators: bit-exact 4-bit weights, activations in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import evaluator

from qpcompile.emit.onnx.record import Recorder
from qpcompile.kernels.linear_w4a16 import onnx as exact
from qpcompile.kernels.linear_w4a16 import onnx_contrib
from tests.kernels.test_linear_w4a16 import random_weight

LOWERINGS = {"few": onnx_contrib.lower_few_rows, "many": onnx_contrib.lower_many_rows}


def lowered(rows: str, in_features: int, out_features: int, groups: int, biased: bool) -> tuple[ir.Model, Any]:
    """A model of one linear layer, and the dense weight and bias that it represents."""
    packed, scale, dense = random_weight(out_features, in_features, groups)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(1))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="one")
    recorder = Recorder(graph)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "S", in_features]))
    graph.inputs.append(x)
    stored = {"w": packed, "s": scale, "b": bias}
    weight, weight_scale, added = (recorder.initializer(key, ir.tensor(each.numpy())) for key, each in stored.items())
    with evaluator.default_as(recorder):
        y = exact.linear_w4a16(x, weight, weight_scale, added if biased else None)
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["B", "S", out_features])
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    LOWERINGS[rows](model)
    exact.lower(model)
    return model, (dense.numpy(), bias.numpy() if biased else 0.0)


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def names(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("in_features", "out_features"), [(3, 1), (33, 7), (96, 65), (128, 10), (300, 24)])
def test_close_to_the_float_product(in_features: int, out_features: int, biased: bool, rows: str) -> None:
    model, (dense, bias) = lowered(rows, in_features, out_features, 1, biased)
    x = np.random.default_rng(0).standard_normal((2, 5, in_features), np.float32)
    x[1, 2] = 0
    expected = x.astype(np.float64) @ dense.T + bias
    found = run(model, x)
    # Half an 8-bit step per input, times the sum of the weights.
    largest = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(found - expected) <= 0.51 * largest * np.abs(dense).sum(1) + 1e-5).all()
    assert ("MatMulNBits" if rows == "few" else "MatMulIntegerToFloat") in names(model)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_rows_that_8_bits_hold_are_exact(rows: str) -> None:
    """Integers with a maximum of 127 in every block are their own codes."""
    model, (dense, _) = lowered(rows, 256, 16, 1, False)
    x = np.random.default_rng(0).integers(-126, 127, (1, 3, 256)).astype(np.float32)
    x[..., ::128] = 127
    np.testing.assert_allclose(run(model, x), x.astype(np.float64) @ dense.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_groups_are_blocks_where_they_can_be(rows: str) -> None:
    model, (dense, _) = lowered(rows, 192, 9, 3, False)
    assert "MatMulNBits" in names(model)
    x = np.random.default_rng(0).standard_normal((1, 4, 192), np.float32)
    np.testing.assert_allclose(run(model, x), x @ dense.T, atol=0.02 * np.abs(x @ dense.T).max())


@pytest.mark.parametrize("rows", ["few", "many"])
def test_other_groups_stay_float_products(rows: str) -> None:
    """The near miss: groups of 24, which are not a supported block size."""
    model, (dense, _) = lowered(rows, 72, 9, 3, False)
    assert not names(model) & {"MatMulNBits", "MatMulIntegerToFloat"}
    x = np.random.default_rng(0).standard_normal((1, 4, 72), np.float32)
    np.testing.assert_allclose(run(model, x), x @ dense.T, rtol=0.02, atol=0.02 * np.abs(x @ dense.T).max())


@pytest.mark.parametrize(("size", "block"), [(16, 16), (48, 16), (64, 64), (256, 128), (24, None), (8, None)])
def test_block_of_a_group(size: int, block: int | None) -> None:
    assert onnx_contrib.block_size(4 * size, 4) == block
    assert onnx_contrib.block_size(7, 1) == onnx_contrib.BLOCK
