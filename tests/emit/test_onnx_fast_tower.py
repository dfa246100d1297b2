"""Pictures and tokens in graphs for speed: attention within segments, patches, rotary positions, tables of 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript import evaluator
from torch import fx

from qpcompile.capture.capture import capture
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.fast.attention import doubled_rope
from qpcompile.emit.onnx.fast.inputs import embedding_16, patches_in_one, rows_of_16_bits, table_16
from qpcompile.emit.onnx.fast.operators import rope, unbind
from qpcompile.emit.onnx.fast.segments import segment_attention
from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.emit.onnx.wrap import Part
from qpcompile.ir.edit import aten
from qpcompile.kernels.segment_attention import reference
from qpcompile.recipe.recipe import Recipe
from tests.emit.test_onnx import Cases, arrays, operators
from tests.families import WIDE_QWEN, qwen2_5_vl, qwen2_vl

Array = np.ndarray[Any, Any]
TYPES = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.int64): ir.DataType.INT64}


def model_of(translate: Callable[..., Any], tensors: dict[str, Array], vary: tuple[int, ...] = ()) -> ir.Model:
    """A model of one translation; the axes in `vary` are dynamic."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="one")
    recorder = Recorder(graph)
    for name, tensor in tensors.items():
        sizes = [f"{name}_{axis}" if axis in vary or tensor.ndim == 1 else n for axis, n in enumerate(tensor.shape)]
        graph.inputs.append(ir.Value(name=name, type=ir.TensorType(TYPES[tensor.dtype]), shape=ir.Shape(sizes)))
    with evaluator.default_as(recorder):
        made = translate(*graph.inputs)
    for index, value in enumerate(made if isinstance(made, tuple) else (made,)):
        value.name, value.dtype = f"y{index}", ir.DataType.FLOAT
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    model.functions.update(recorder.functions)
    InlinePass()(model)
    return model


def run(model: ir.Model, tensors: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(each) for each in session.run(None, tensors)]


def translate_segments(*given: Any) -> Any:
    q, k, v, ends = given
    return segment_attention(q, k, v, ends, 0.3)


def segments(heads: int, groups: int, width: int, lengths: list[int]) -> dict[str, Array]:
    draw = np.random.default_rng(0)
    shapes = ((heads, "q"), (groups, "k"), (groups, "v"))
    found: dict[str, Array] = {
        name: draw.standard_normal((1, count, sum(lengths), width), np.float32) for count, name in shapes
    }
    return found | {"ends": np.cumsum([0, *lengths])}


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [4, 9, 1], [0, 6, 0, 2, 0]], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2)])
def test_attention_in_segments_is_the_reference(heads: int, groups: int, lengths: list[int]) -> None:
    """Segments of one length, of several, empty ones; grouped heads take the slow path."""
    given = segments(heads, groups, 8, lengths)
    model = model_of(translate_segments, given, vary=(2,))
    q, k, v, ends = (torch.from_numpy(each) for each in given.values())
    expected = reference.segment_attention(q, k, v, ends, 0.3)
    np.testing.assert_allclose(run(model, given)[0], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_no_matrix_of_all_patches() -> None:
    """One segment of many tokens takes less than half of the memory of its full attention matrix."""
    given = segments(2, 2, 8, [4096])
    model = model_of(translate_segments, given, vary=(2,))
    before = peak_mb()
    run(model, given)
    assert peak_mb() - before < 2 * 4096**2 * 4 / 2**20 / 2


def peak_mb() -> float:
    """Peak memory of this process, in MiB."""
    (line,) = (each for each in Path("/proc/self/status").read_text("utf-8").splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


@pytest.mark.parametrize(("perm", "dim"), [((1, 0, 2, 3), 0), ((2, 0, 3, 1), -1), ((3, 2, 1, 0), 2)])
def test_parts_are_cut_out_before_axes_move(perm: tuple[int, ...], dim: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)

    def translate(given: Any) -> Any:
        recorder = evaluator.default()
        assert isinstance(recorder, Recorder)
        moved = recorder._node("", "Transpose", [given], {"perm": perm}, 1)
        moved.shape = ir.Shape([x.shape[axis] for axis in perm])
        return unbind(moved, dim)

    model = model_of(translate, {"x": x})
    expected = torch.from_numpy(x).permute(perm).unbind(dim)
    for found, wanted in zip(run(model, {"x": x}), expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize("family", [pytest.param(qwen2_vl, marks=pytest.mark.slow), qwen2_5_vl])
def test_towers_of_any_size(family: Callable[..., tuple[Any, Cases]], tmp_path: Path) -> None:
    """Pictures that fill their windows and ones that do not, one and several: the tokens are the model's."""
    model, cases = family(**WIDE_QWEN)
    export_onnx(capture(model, cases["one"], Recipe.load("none")), tmp_path / "fast", fast=True)
    runner = OnnxVLM(tmp_path / "fast", threads=1)
    for name, case in cases.items():
        expected = model.generate(**case, max_new_tokens=6, do_sample=False)
        assert runner.generate(**arrays(case), max_new_tokens=6).tolist() == expected.tolist(), name
    found = operators(tmp_path / "fast", "vision")
    assert found["If"] == 2 and not found["Conv"] and not found["Softmax"]


@pytest.mark.parametrize("sizes", [(2, 3, 5, 8), (5, 3, 8)], ids=["heads first", "tokens first"])
def test_rotary_positions(sizes: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    halves = [draw.standard_normal((sizes[0], 1, *sizes[2:-1], 4), np.float32) for _ in range(2)]
    given = {"x": draw.standard_normal(sizes, np.float32)}
    given |= {name: np.concatenate([half] * 2, -1) for name, half in zip(("cos", "sin"), halves, strict=True)}
    expected = doubled_rope(*(torch.from_numpy(each) for each in given.values()))
    found = run(model_of(rope, given, vary=(0,)), given)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


class Patches(torch.nn.Module):
    """A convolution; with `kernel` 4 and no padding it covers all of its input."""

    def __init__(self, kernel: int, padding: int = 0, biased: bool = True) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, kernel, stride=kernel, padding=padding, bias=biased)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.conv2d.default(x, self.conv.weight, self.conv.bias, [4, 4], [self.conv.padding[0]] * 2)


def part_of(module: torch.nn.Module, x: torch.Tensor) -> Part:
    traced = fx.symbolic_trace(module)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = x
    return Part(traced, ("x",), ("y",))


@pytest.mark.parametrize("biased", [False, True])
def test_a_kernel_over_all_of_its_input_is_a_product(biased: bool) -> None:
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    part = part_of(Patches(4, biased=biased), x)
    expected = part.module(x)
    patches_in_one(part)
    part.module.graph.eliminate_dead_code()
    part.module.recompile()
    assert not part.module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    torch.testing.assert_close(part.module(x), expected)


@pytest.mark.parametrize(("kernel", "padding", "side"), [(4, 1, 4), (2, 0, 4), (4, 0, 8)])
def test_other_kernels_stay(kernel: int, padding: int, side: int) -> None:
    """The near misses: padding, and patches that were not extracted before."""
    x = torch.zeros(2, 3, side, side)
    part = part_of(Patches(kernel, padding), x)
    patches_in_one(part)
    assert part.module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert not part.module.graph.find_nodes(op="call_function", target=aten.linear.default)


def test_tables_of_16_bits() -> None:
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    exact = weight.bfloat16().float()
    assert table_16(exact.numpy()).dtype == ir.DataType.BFLOAT16
    stored = table_16(weight.numpy())
    assert stored.dtype == ir.DataType.FLOAT16
    np.testing.assert_allclose(stored.numpy().astype(np.float32), weight.numpy(), rtol=2**-11, atol=2**-25)
    ids = np.array([6, 0, 3])
    for table, dtype in ((exact, ir.DataType.BFLOAT16), (weight, ir.DataType.FLOAT16)):

        def translate(given: Any, table: torch.Tensor = table) -> Any:
            recorder = evaluator.default()
            assert isinstance(recorder, Recorder)
            return rows_of_16_bits(recorder.initializer("table", ir.tensor(table.numpy())), given)

        model = model_of(translate, {"ids": ids})
        assert dtype in {value.dtype for value in model.graph.initializers.values()}
        found = run(model, {"ids": ids})[0]
        np.testing.assert_allclose(found, embedding_16(table, torch.from_numpy(ids)), rtol=2**-11, atol=2**-25)


def test_numbers_beyond_16_bits_end_at_the_largest() -> None:
    found = table_16(np.array([[1e6, -1e6, 0.1]], np.float32)).numpy().astype(np.float32)
    assert found[0, :2].tolist() == [65504.0, -65504.0]
