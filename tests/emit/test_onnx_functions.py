"""ONNX functions: one node per operator, the same numbers, and nothing hidden in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import InlinePass
from onnxscript import FLOAT, evaluator, opset18, opset21, script

import qpcompile
from qpcompile.capture.load import load_model
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.demands import demands
from qpcompile.emit.onnx.example import SIZES, decode_example, prefill_example, vision_example
from qpcompile.emit.onnx.export import DECODE, PREFILL, VISION, build_models, export_onnx
from qpcompile.emit.onnx.functions import finish
from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.runner import folder as folder_module
from qpcompile.emit.onnx.runner.folder import GRAPHS, RunnerError, check_graph
from qpcompile.emit.onnx.runtimes import RUNTIMES, with_functions
from qpcompile.emit.onnx.translate.nodes import GIVEN, results
from qpcompile.emit.onnx.wrap import language, vision
from qpcompile.recipe.recipe import Recipe
from tests.emit.test_onnx import CUTS, Cases, compiled
from tests.emit.test_onnx_runtimes import folder_of, graph

op: Any = opset21
loop: Any = opset18
BEDS = Path(__file__).resolve().parents[1] / "testbed"
GOAL = 1184
"""Nodes of a testbed's prefill: a third of what they were when each operator was written in place."""
Body = Callable[[ir.Value], Any]


def recorded(*bodies: tuple[str, Body], sizes: Sequence[int | str] = ("n", 4)) -> ir.Model:
    """A graph from x to y of calls one after another: the name of each one's operator, and its nodes."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes))
    model.graph.inputs.append(x)
    recorder, given = Recorder(model.graph), {}
    with evaluator.default_as(recorder):  # type: ignore[arg-type]
        for index, (operator, body) in enumerate(bodies):
            recorder.call = f"call_{index} {operator}"
            given[recorder.call] = {x: "x"}
            x = body(x)
    x.name, x.dtype, x.shape = "y", ir.DataType.FLOAT, ir.Shape(sizes)
    model.graph.outputs.append(x)
    model.functions.update(recorder.functions)
    model.meta[GIVEN] = given
    InlinePass()(model)
    return model


def scaled(factor: float, axis: int = -1) -> Body:
    return lambda x: op.Mul(op.Div(x, op.Add(op.ReduceMax(op.Abs(x), [axis], keepdims=1), 1.0)), factor)


def answer(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]  # type: ignore[return-value]


def compared(*bodies: tuple[str, Body], sizes: Sequence[int | str] = ("n", 4)) -> ir.Model:
    """A graph with functions, which computes what it computes without."""
    flat, made = recorded(*bodies, sizes=sizes), recorded(*bodies, sizes=sizes)
    finish(flat, functions=False)
    finish(made, functions=True)
    assert not flat.functions and not any(node.metadata_props for node in (*flat.graph, *made.graph))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert np.array_equal(answer(flat, x), answer(made, x))
    return made


def calls(model: ir.Model) -> list[tuple[str, int]]:
    """Name and number of inputs of every node."""
    return [(node.op_type, len(node.inputs)) for node in model.graph]


def test_calls_with_equal_bodies_share_one() -> None:
    made = compared(("scale", scaled(0.5)), ("scale", scaled(0.5)))
    assert calls(made) == [("scale", 1), ("scale", 1)]
    (function,) = made.functions.values()
    assert [value.name for value in function.inputs] == ["x"] and [value.name for value in function.outputs] == ["y"]
    assert [node.name for node in made.graph] == ["call_0", "call_1"]


def test_numbers_that_differ_are_inputs_and_axes_that_differ_make_another_function() -> None:
    made = compared(("scale", scaled(0.5)), ("scale", scaled(2.0)), ("scale", scaled(2.0, axis=-2)))
    assert calls(made) == [("scale", 2), ("scale", 2), ("scale_2", 1)]
    assert len(made.functions) == 2


def test_an_operator_of_two_nodes_stays_as_it_is() -> None:
    made = compared(("double", lambda x: op.Mul(op.Abs(x), 2.0)))
    assert calls(made) == [("Abs", 1), ("Mul", 2)] and not made.functions and "qpcompile" not in made.opset_imports


def test_a_result_that_is_used_twice_and_one_that_is_the_graphs() -> None:
    def two(x: ir.Value) -> Any:
        low, high = op.Neg(op.Abs(x)), op.Exp(op.Abs(x))
        return op.Add(op.Add(low, high), op.Mul(low, high))

    assert calls(compared(("two", two), ("scale", scaled(0.5)))) == [("two", 1), ("scale", 1)]


@script()
def summed(x, step) -> FLOAT[...]:  # noqa: ANN001
    """x: f32[n, 4], step: f32[]: numbers from outside are taken inside of the loop, too."""
    edge = loop.Constant(value_float=0.25)
    total = x * 0.0
    for _ in range(3):
        total = total + loop.Where(x > edge, x * step, edge)
    return total


def test_a_loop_takes_what_its_call_takes() -> None:
    def looped(step: float) -> Body:
        return lambda x: op.Add(summed(x, op.Constant(value_float=step)), op.Abs(x))

    made = compared(("sum", looped(0.5)), ("sum", looped(3.0)), ("scale", scaled(0.5)))
    assert calls(made) == [("sum", 2), ("sum", 2), ("scale", 1)]


def test_finished_twice_is_finished_once() -> None:
    made = compared(("scale", scaled(0.5)), ("scale", scaled(2.0)))
    text = ir.to_proto(made).SerializeToString(deterministic=True)
    finish(made, functions=True)
    assert ir.to_proto(made).SerializeToString(deterministic=True) == text


@pytest.fixture(scope="module")
def folder(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two cuts, 4-bit weights, activations and cache, for any runtime; do not change it."""
    program = compiled(compiled_llava.program, tiny_llava[1], "quota-30", CUTS)
    place = tmp_path_factory.mktemp("functions") / "folder"
    export_onnx(program, place)
    return place


def top(folder: Path, name: str) -> Counter[str]:
    """How often each operator is called in a graph itself; `_2` tells bodies of an operator apart."""
    nodes = onnx.load(folder / name, load_external_data=False).graph.node
    return Counter(re.sub(r"_\d+$", "", node.op_type) if node.domain else node.op_type for node in nodes)


def test_each_operator_is_one_node(folder: Path) -> None:
    found, layers, cuts = top(folder, "prefill.onnx"), 3, 2
    # A layer without a shift has another body: rmsnorm_quantize_2.
    assert found["rmsnorm_quantize"] == 2 * layers and found["rope_kv_write"] == found["attention_kv"] == layers
    assert found["token_scores"] == found["select_tokens"] == cuts
    assert not {"MatMulInteger", "Round", "Softmax", "TopK"} & found.keys()
    assert top(folder, "decode.onnx")["attention_step"] == layers
    for name in GRAPHS:
        model = onnx.load(folder / name, load_external_data=False)
        inlined = onnx.inliner.inline_local_functions(model)
        assert 4 * len(model.graph.node) < len(inlined.graph.node)
        own = {each.name for each in model.functions}
        assert own == {node.op_type for node in model.graph.node if node.domain == "qpcompile"}
        assert not own & {node.op_type for each in model.functions for node in each.node}
    assert "onnx.inliner" in (folder / "README.md").read_text()


def test_functions_compute_what_is_computed_in_place(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], tmp_path: Path
) -> None:
    """Bit for bit, at default settings of onnxruntime."""
    program = compiled(compiled_llava.program, tiny_llava[1], "quota-30", CUTS, "numerics=exact")
    parts = {VISION: vision(program)} | {name: language(program, name) for name in (PREFILL, DECODE)}
    feeds = {VISION: vision_example(program, SIZES[0])}
    feeds[PREFILL] = prefill_example(program, SIZES[0], results(parts[VISION], feeds[VISION]))
    feeds[DECODE] = decode_example(program, feeds[PREFILL], results(parts[PREFILL], feeds[PREFILL]))
    made = {functions: build_models(program).models for functions in (False, True)}
    for name, given in feeds.items():
        found = []
        for functions, models in made.items():
            finish(models[name], functions)
            ir.save(models[name], tmp_path / f"{name}.onnx")
            session = ort.InferenceSession(tmp_path / f"{name}.onnx")
            found.append(session.run(None, {each.name: given[each.name].numpy() for each in session.get_inputs()}))
        assert len(found[0]) == len(found[1]) > 0
        for left, right in zip(*found, strict=True):
            np.testing.assert_array_equal(left, right)


def test_runtimes_without_functions_get_none(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], folder: Path, tmp_path: Path
) -> None:
    program = compiled(compiled_llava.program, tiny_llava[1], "w4a4kv4")
    assert [name for name in RUNTIMES if with_functions(name)] == ["onnxruntime", "web", "genai"] and with_functions(
        None
    )
    export_onnx(program, tmp_path / "ov", target="openvino")
    assert json.loads((tmp_path / "ov" / "check.json").read_text())["runtime"]["functions"] is False
    assert not any(onnx.load(tmp_path / "ov" / name, load_external_data=False).functions for name in GRAPHS)
    assert "onnx.inliner" not in (tmp_path / "ov" / "README.md").read_text()
    problems = demands(folder, "openvino")["problems"]
    assert len([line for line in problems if "reads no functions" in line]) == len(GRAPHS)


def own_function(*nodes: onnx.NodeProto, name: str = "hidden", domain: str = "qpcompile") -> onnx.FunctionProto:
    opsets = [onnx.helper.make_opsetid(each, 1 if each else 21) for each in ("", "com.microsoft", "qpcompile")]
    return onnx.helper.make_function(domain, name, ["a"], ["b"], nodes, opsets)


def node(kind: str, domain: str = "", taken: str = "a", made: str = "b") -> onnx.NodeProto:
    return onnx.helper.make_node(kind, [taken], [made], f"{kind}_{taken}_{made}", None, domain)


def calling(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    model = graph(node("hidden", "qpcompile", "x", "z"), node("hidden", "qpcompile", "z", "y"))
    model.opset_import.append(onnx.helper.make_opsetid("qpcompile", 1))
    model.functions.extend(functions)
    return model


def test_an_operator_in_a_function_is_a_demand_at_every_call(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, calling(own_function(node("MatMulNBits", "com.microsoft"))))
    assert demands(folder, "onnxruntime")["problems"] == []
    assert "vision.onnx: it has no com.microsoft.MatMulNBits (2 nodes)" in demands(folder, "openvino")["problems"]


def test_float64_in_a_function_is_told(tmp_path: Path) -> None:
    wide = onnx.helper.make_node("Cast", ["a"], ["w"], to=onnx.TensorProto.DOUBLE)
    narrow = onnx.helper.make_node("Cast", ["w"], ["b"], to=onnx.TensorProto.FLOAT)
    folder = folder_of(tmp_path, calling(own_function(wide, narrow)))
    assert any("double" in line and "Cast" in line for line in demands(folder, "openvino")["problems"])


def with_default(function: onnx.FunctionProto) -> onnx.FunctionProto:
    function.attribute_proto.append(onnx.helper.make_attribute("k", 1))
    return function


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "unknown operator": (calling(own_function(node("PyOp"))), "PyOp"),
    "another domain": (calling(own_function(node("Abs"), domain="own")), "own.hidden"),
    "no domain": (calling(own_function(node("Abs"), name="Abs", domain="")), "the function"),
    "itself": (calling(own_function(node("hidden", "qpcompile"))), "qpcompile.hidden"),
    "another function": (
        calling(own_function(node("Abs"), name="other"), own_function(node("other", "qpcompile"))),
        "qpcompile.other",
    ),
    "none of that name": (calling(own_function(node("Abs"), name="other")), "qpcompile.hidden"),
    "a name of 0.1 MB": (calling(own_function(node("Abs"), name="n" * 100_000)), "function 'qpcompile.n"),
    "twice": (calling(own_function(node("Abs")), own_function(node("Neg"))), "two functions 'hidden'"),
    "attributes": (calling(with_default(own_function(node("Abs")))), "attributes"),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=list(REFUSED))
def test_functions_that_no_export_writes_are_refused(tmp_path: Path, model: onnx.ModelProto, message: str) -> None:
    (tmp_path / "decode.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RunnerError, match=message) as error:
        check_graph(tmp_path / "decode.onnx", 0)
    assert "decode.onnx" in error.value.where


def test_functions_may_not_make_a_graph_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = own_function(*(node("Abs", "", f"a{i}" if i else "a", f"a{i + 1}") for i in range(100)))
    path = tmp_path / "decode.onnx"
    path.write_bytes(calling(function).SerializeToString())
    check_graph(path, 0)
    monkeypatch.setattr(folder_module, "MOST_GRAPH", 2 * len(function.SerializeToString()))
    with pytest.raises(RunnerError, match="with its functions in place"):
        check_graph(path, 0)


# One node more than fits, tensors, values, operands of a node, texts of an attribute, and calls of a function.
MANY = {
    "nodes": lambda model: model.graph.node.extend([node("Abs")] * 300),
    "tensors": lambda model: model.graph.initializer.extend([onnx.numpy_helper.from_array(np.zeros(1))] * 300),
    "values": lambda model: model.graph.value_info.extend([onnx.ValueInfoProto(name="v")] * 300),
    "operands": lambda model: model.graph.node[0].input.extend([""] * 300),
    "texts": lambda model: model.graph.node[1].attribute.append(onnx.helper.make_attribute("t", ["x"] * 300)),
    "calls": lambda model: model.graph.node.extend([model.graph.node[0]] * 20),
    "a function": lambda model: model.functions[0].node.extend([node("Abs")] * 300),
}


@pytest.mark.parametrize("add", MANY.values(), ids=list(MANY))
def test_a_graph_of_very_many_small_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add: Callable[[onnx.ModelProto], None]
) -> None:
    """A runtime needs a hundred times the bytes of a file that holds nothing but nodes or names."""
    monkeypatch.setattr(folder_module, "MOST_PARTS", 200)
    model, path = calling(own_function(*[node("Abs")] * 5)), tmp_path / "decode.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph(path, 0)
    add(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RunnerError, match="more than 200 operands"):
        check_graph(path, 0)


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_call_may_not_make_the_names_in_a_function_huge(tmp_path: Path, place: str) -> None:
    """Names of a call stand for those of its function, wherever these are read."""
    model, path = calling(own_function(node("Abs"))), tmp_path / "decode.onnx"
    first, second = model.graph.node
    for name in ("n" * folder_module.LONGEST_NAME, "n" * (folder_module.LONGEST_NAME + 1)):
        if place == "input":
            model.graph.input[0].name = first.input[0] = name
        else:
            first.output[0] = second.input[0] = name
        path.write_bytes(model.SerializeToString())
        if len(name) > folder_module.LONGEST_NAME:
            with pytest.raises(RunnerError, match="a name of 513 bytes"):
                check_graph(path, 0)
        else:
            check_graph(path, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["joint-30", "w4a4kv4"])
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_a_testbeds_prefill_has_a_third_of_the_nodes(bed: str, preset: str, tmp_path: Path) -> None:
    brief = ("calibration.samples=2", "quantize.training.samples=2", "quantize.training.epochs=1")
    model, processor = load_model(BEDS / bed)
    recipe = Recipe.load(preset).with_overrides(brief)
    made = qpcompile.compile(model, recipe, processor=processor, calibration=BEDS / "calibration" / bed)
    for fast in (False, True):
        made.export_onnx(tmp_path / str(fast), fast=fast)
        written = onnx.load(tmp_path / str(fast) / "prefill.onnx", load_external_data=False)
        inlined = onnx.inliner.inline_local_functions(written)
        assert len(written.graph.node) <= GOAL / 2
        assert sum(each.op_type != "Constant" for each in inlined.graph.node) < 2 * GOAL
