"""qpcompile::linear_w4a16 in onnxruntime's contrib operators, which round activations to 8 bits internally.

    a few rows    MatMulNBits(x, W), accuracy level 4: activations in blocks of inputs, weights read as 4 bits
    many rows     s = max|x| / 127 per row;  MatMulIntegerToFloat(uint8(x / s + 128), int8(W)) * s + bias

Both read the same stored bytes: two unsigned codes per byte, adjacent along the inputs, zero point 8. Weight scales are
exact in both. For many rows onnxruntime constant-folds the int8 matrix, still with zero point 8, when it loads the
model: all matrices at once, so that the intermediate tensors of that folding determine peak memory.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qpcompile.kernels.linear_int.placeholder import CALL, Store, constant, lower_placeholders, pack_pairs
from qpcompile.kernels.linear_w4a16 import onnx as exact

CONTRIB = "com.microsoft"
# Inputs that share an activation scale; a power of two, at least 16. 256 is 10 % faster on one row, and coarser.
BLOCK = 128
ZERO_POINT = 8
LEVELS = 127.0
# Replaces the maximum of an all-zero row.
SMALLEST = 1e-30

Rows = dict[ir.Value, tuple[ir.Value, ir.Value]]


def lower_few_rows(model: ir.Model) -> None:
    """Replace the placeholders of linear_w4a16 in `model` by MatMulNBits, in place."""
    _lower(model, _by_blocks, _nbits_blocks)


def lower_many_rows(model: ir.Model) -> None:
    """Replace them by products of 8-bit integers; those with scales per group by MatMulNBits."""
    rounded: Rows = {}

    def build(tape: ir.tape.Tape, node: ir.Node, weight: ir.Value, weight_scale: np.ndarray) -> ir.Value:
        return _integer_product(tape, node, weight, weight_scale, rounded)

    _lower(model, build, _uint4_rows, one_group=True)
    _lower(model, _by_blocks, _nbits_blocks)


def block_size(in_features: int, groups: int) -> int | None:
    """The largest block of inputs with one weight scale; None if groups cannot be split into blocks."""
    if groups == 1:
        return BLOCK
    size = in_features // groups
    block = min(size & -size, BLOCK)
    return block if block >= 16 else None


def _lower(model: ir.Model, build: Callable[..., ir.Value], store: Store, one_group: bool = False) -> None:
    def takes(in_features: int, groups: int) -> bool:
        return groups == 1 if one_group else block_size(in_features, groups) is not None

    lower_placeholders(model, exact.NAME, 1, build, store, takes)
    model.graph.opset_imports.setdefault(CONTRIB, 1)


def _blocks(codes: np.ndarray, block: int) -> np.ndarray:
    """codes: i8[N, K] -> u8[N, B * block], shifted to 0..15; the last block is padded with the zero point."""
    return np.pad(codes + ZERO_POINT, ((0, 0), (0, -codes.shape[1] % block)), constant_values=ZERO_POINT)


def _nbits_blocks(codes: np.ndarray, weight_scale: np.ndarray) -> tuple[str, ir.TensorProtocol]:
    """UINT8[N, B, block / 2], as MatMulNBits reads it."""
    block = block_size(codes.shape[1], weight_scale.shape[1])
    assert block is not None
    filled = _blocks(codes, block)
    data = pack_pairs(filled).reshape(len(codes), filled.shape[1] // block, block // 2)
    return "blocks", ir.tensor(data)


def _uint4_rows(codes: np.ndarray, weight_scale: np.ndarray) -> tuple[str, ir.TensorProtocol]:
    """The same bytes as UINT4[N, B * block]."""
    filled = _blocks(codes, BLOCK)
    return "rows", ir.PackedTensor(pack_pairs(filled), ir.DataType.UINT4, shape=ir.Shape(filled.shape))


def _by_blocks(tape: ir.tape.Tape, node: ir.Node, weight: ir.Value, weight_scale: np.ndarray) -> ir.Value:
    in_features = node.attributes["in_features"].as_int()
    block = block_size(in_features, weight_scale.shape[1])
    assert block is not None and weight.shape is not None
    count = weight.shape[1]
    assert isinstance(count, int)
    attributes = {"K": in_features, "N": len(weight_scale), "bits": 4, "block_size": block, "accuracy_level": 4}
    x, bias = _inputs(node)
    inputs = [x, weight, _block_scales(tape, weight_scale, count), None, None, bias]
    return tape.op("MatMulNBits", inputs[: None if bias is not None else 3], attributes, domain=CONTRIB)


def _block_scales(tape: ir.tape.Tape, weight_scale: np.ndarray, count: int) -> ir.Value:
    """weight_scale: f32[N, G] -> f32[N, count], repeated for the blocks of each group, when the model is loaded."""
    features, groups = weight_scale.shape
    wide = constant(tape, np.array([features, groups, count // groups], np.int64))
    copies = tape.op("Expand", [constant(tape, np.ascontiguousarray(weight_scale)[..., None]), wide])
    return tape.op("Reshape", [copies, constant(tape, np.array([features, count], np.int64))])


def _integer_product(
    tape: ir.tape.Tape, node: ir.Node, weight: ir.Value, weight_scale: np.ndarray, rounded: Rows
) -> ir.Value:
    x, bias = _inputs(node)
    # Query, key and value projections read the same rows: quantize them once.
    if x not in rounded:
        made = len(tape.nodes)
        rounded[x] = _rounded(tape, x)
        if CALL in node.metadata_props:
            for each in tape.nodes[made:]:
                each.metadata_props[CALL] = f"{node.metadata_props[CALL].split()[0]}_rows rows_to_8_bits"
    codes, scale = rounded[x]
    one, zeros = constant(tape, np.float32(1)), [constant(tape, np.uint8(128)), constant(tape, np.int8(ZERO_POINT))]
    matrix = _int8_matrix(tape, weight, node.attributes["in_features"].as_int())
    inputs = [codes, matrix, one, constant(tape, weight_scale.reshape(-1)), *zeros]
    y = tape.op("Mul", [tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB), scale])
    y = y if bias is None else tape.op("Add", [y, bias])
    leading = tape.op("Shape", [x], {"end": -1})
    width = constant(tape, np.array([len(weight_scale)], np.int64))
    return tape.op("Reshape", [y, tape.op("Concat", [leading, width], {"axis": 0})])


def _rounded(tape: ir.tape.Tape, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x: f32[..., K] -> u8[T, K] with zero point 128, f32[T, 1], one scale per row."""
    last = constant(tape, np.array([-1], np.int64))
    rows = tape.op("Flatten", [x], {"axis": -1})
    high = tape.op("ReduceMax", [rows, last], {"keepdims": 1})
    low = tape.op("Neg", [tape.op("ReduceMin", [rows, last], {"keepdims": 1})])
    largest = tape.op("Max", [high, low, constant(tape, np.float32(SMALLEST))])
    scale = tape.op("Mul", [largest, constant(tape, np.float32(1 / LEVELS))])
    scales = tape.op("Reshape", [scale, last])
    zeros = tape.op("Expand", [constant(tape, np.uint8(128)), tape.op("Shape", [scales])])
    return tape.op("QuantizeLinear", [rows, scales, zeros], {"axis": 0}), scale


def _int8_matrix(tape: ir.tape.Tape, weight: ir.Value, in_features: int) -> ir.Value:
    """weight: UINT4[N, B * block] -> i8[K, N], zero point 8; constant, so that it is folded at load time."""
    rows = tape.op("Cast", [weight], {"to": ir.DataType.INT8})
    assert weight.shape is not None
    if weight.shape[1] != in_features:
        ends = [constant(tape, np.array([number], np.int64)) for number in (0, in_features, 1)]
        rows = tape.op("Slice", [rows, *ends])
    return tape.op("Transpose", [rows], {"perm": [1, 0]})


def _inputs(node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """The activations and the bias: both float32, like everything in an exported graph."""
    x, bias = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    assert x is not None
    return x, bias
