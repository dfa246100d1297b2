"""Folders for a runtime: its form of graphs, and what `check.json` says that the runtime lacks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from qpcompile.cli.main import app
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx import demands as demands_module
from qpcompile.emit.onnx.demands import demands
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.runner.folder import CONTRIB_OPERATORS, GRAPHS, OPERATORS, WEIGHTS
from qpcompile.emit.onnx.runtimes import RUNTIMES, fast_form, runtime
from qpcompile.errors import ExportError
from qpcompile.kernels.kv_read.onnx import unpack_planes
from tests.emit.test_onnx import Cases, compiled


def graph(*nodes: onnx.NodeProto, kind: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph of these nodes from x to y."""
    ends = [onnx.helper.make_tensor_value_info(name, kind, [2]) for name in "xy"]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=opsets)


def folder_of(place: Path, model: onnx.ModelProto) -> Path:
    for name in GRAPHS:
        onnx.save(model, place / name)
    (place / WEIGHTS).write_bytes(b"")
    return place


def test_every_operator_was_looked_up() -> None:
    """A new operator: look it up in the list of every runtime, add it to `lacks` where it is missing, then count it."""
    assert (len(OPERATORS), len(CONTRIB_OPERATORS)) == (95, 5)
    for each in RUNTIMES.values():
        assert each.lacks <= OPERATORS and each.contrib <= CONTRIB_OPERATORS
        assert all(onnx.TensorProto.DataType.Value(name) for name in each.types)


@pytest.mark.parametrize(
    ("name", "node", "said"),
    [
        ("openvino", onnx.helper.make_node("Abs", ["x"], ["y"]), ""),
        ("openvino", onnx.helper.make_node("SequenceEmpty", [], ["y"]), "it has no SequenceEmpty (1 nodes)"),
        ("openvino", onnx.helper.make_node("MatMulNBits", ["x"], ["y"], "n", None, "com.microsoft"),
         "it has no com.microsoft.MatMulNBits (1 nodes)"),
        ("onnxruntime", onnx.helper.make_node("MatMulNBits", ["x"], ["y"], "n", None, "com.microsoft"), ""),
        ("tensorrt", onnx.helper.make_node("MatMulInteger", ["x", "x"], ["y"]), "it has no MatMulInteger (1 nodes)"),
    ],
)  # fmt: skip
def test_operators_that_a_runtime_lacks(tmp_path: Path, name: str, node: onnx.NodeProto, said: str) -> None:
    found = demands(folder_of(tmp_path, graph(node)), name)
    assert found["problems"] == ([f"{each}: {said}" for each in GRAPHS] if said else [])


def test_operators_inside_operators_count(tmp_path: Path) -> None:
    made = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.INT64, None)
    inner = onnx.helper.make_graph([onnx.helper.make_node("NonZero", ["x"], ["z"])], "g", [], [made])
    either = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    folder = folder_of(tmp_path, graph(either, kind=onnx.TensorProto.BOOL))
    assert "vision.onnx: it has no NonZero (2 nodes)" in demands(folder, "tensorrt")["problems"]


def test_types_are_told(tmp_path: Path) -> None:
    model = graph(onnx.helper.make_node("Abs", ["x"], ["y"]), kind=onnx.TensorProto.DOUBLE)
    folder = folder_of(tmp_path, model)
    assert demands(folder, "onnxruntime")["problems"] == []
    for name in ("openvino", "tensorrt"):
        problems = demands(folder, name)["problems"]
        assert len(problems) == 3 and all(
            "double is computed as float32" in line and "Abs" in line for line in problems
        )


def test_weights_that_a_browser_cannot_hold(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demands(plain, "web")["problems"] == []
    monkeypatch.setattr(demands_module, "MOST_ARRAY", 1000)
    monkeypatch.setattr(demands_module, "MOST_MEMORY", 2000)
    array, memory = demands(plain, "web")["problems"]
    assert "more than one array of a browser holds" in array and "WebAssembly has 2000" in memory
    assert demands(plain, "onnxruntime")["problems"] == []


def test_the_runtime_chooses_the_form() -> None:
    chosen = {name: fast_form(False, name) for name in RUNTIMES}
    assert chosen == {"onnxruntime": True, "web": True, "genai": True, "openvino": False, "tensorrt": False}
    assert fast_form(True, "web") and fast_form(True, None) and not fast_form(False, None)
    with pytest.raises(ExportError, match="which openvino does not run"):
        fast_form(True, "openvino")
    with pytest.raises(ExportError, match="no runtime 'ncnn'") as error:
        runtime("ncnn")
    assert "onnxruntime, web, genai, openvino" in str(error.value.do)


def test_an_export_says_what_its_runtime_lacks(
    compiled_llava: CompiledVLM,
    tiny_llava: tuple[object, Cases],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = compiled(compiled_llava.program, tiny_llava[1], "w4a4kv4")
    with caplog.at_level(logging.WARNING, "qpcompile"):
        export_onnx(program, tmp_path / "trt", target="tensorrt")
    said = json.loads((tmp_path / "trt" / "check.json").read_text())["runtime"]
    assert said["name"] == "tensorrt" and not said["fast"] and "onnx-tensorrt" in said["source"]
    lacking = {line.split("has no ")[1].split(" (")[0] for line in said["problems"] if "has no" in line}
    assert {"MatMulInteger", "BitShift", "BitwiseAnd"} == lacking
    assert all(f"tensorrt: {line}" in caplog.messages for line in said["problems"])
    listed = json.loads((tmp_path / "trt" / "manifest.json").read_text())
    assert "check.json" in listed["files"]
    export_onnx(program, tmp_path / "ov", target="openvino")
    said = json.loads((tmp_path / "ov" / "check.json").read_text())["runtime"]
    assert said["problems"] == [] and said["settings"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_the_command_line_refuses_before_it_compiles(tmp_path: Path) -> None:
    for words in (["--for", "ncnn"], ["--for", "openvino", "--fast"]):
        done = CliRunner().invoke(app, ["export", "nowhere", "--output", str(tmp_path / "out"), *words])
        assert done.exit_code == 1 and "what to do: " in done.output and not (tmp_path / "out").exists()
        assert "ncnn" in done.output or "openvino" in done.output


def test_high_halves_of_bytes_need_no_rounding() -> None:
    """OpenVINO divides where ONNX shifts, and rounds: what is shifted has no bit that would be lost."""
    from onnxscript import evaluator

    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    codes = ir.Value(name="codes", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([256]))
    model.graph.inputs.append(codes)
    with evaluator.default_as(Recorder(model.graph)):  # type: ignore[arg-type]
        model.graph.outputs.append(unpack_planes(codes, 512))
    shift = next(node for node in model.graph if node.op_type == "BitShift")
    masked = shift.inputs[0]
    assert masked is not None and masked.producer() is not None
    mask = masked.producer()
    assert mask.op_type == "BitwiseAnd" and mask.inputs[1].const_value.numpy().tolist() == [240]  # type: ignore[union-attr]
    every = np.arange(256, dtype=np.uint8)
    runs: Any = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
    (found,) = runs.run(None, {"codes": every})
    assert np.array_equal(found, np.concatenate([every & 15, every >> 4]))
