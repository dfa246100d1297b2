"""OpenVINO computes what onnxruntime computes, and keeps the same tokens, on folders exported for it.

Needs `pip install openvino`, in an environment of its own or in this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.runner.folder import GRAPHS
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from tests.emit.test_onnx import Cases, arrays, compiled

openvino: Any = pytest.importorskip("openvino", reason="run: pip install openvino")
pytestmark = pytest.mark.slow

CUTS = ("tokens.method=fastv", "tokens.keep=0.4", "tokens.candidate_layers=[0]")


class Compared:
    """A session of onnxruntime that runs the same graph in OpenVINO on the same inputs, and compares all outputs."""

    def __init__(self, session: Any, model: Any, settings: dict[str, str]) -> None:
        self.session = session
        self.request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_ort_values(self, names: list[str], values: dict[str, Any], options: Any = None) -> list[Any]:
        """An input of OpenVINO's may have several names, of which the graph's own is one."""
        wanted = self.session.run_with_ort_values(names, values, options)
        known = {name for entry in self.request.model_inputs for name in entry.get_names()}
        found = self.request.infer({name: values[name].numpy() for name in known & set(values)})
        for name, value in zip(names, wanted, strict=True):
            array = value.numpy()
            exact = array.dtype.kind != "f"
            np.testing.assert_allclose(found[name], array, 0 if exact else 1e-4, 0 if exact else 1e-5, err_msg=name)
        self.runs += 1
        return wanted


@pytest.mark.parametrize("preset", ["none", "w4a16"])
@pytest.mark.parametrize("form", ["onnx", "ir"])
def test_every_graph_computes_what_onnxruntime_computes(
    compiled_llava: CompiledVLM, tiny_llava: tuple[object, Cases], tmp_path: Path, preset: str, form: str
) -> None:
    """Kept tokens are whole numbers, and equal; whole answers may differ where two scores nearly tie."""
    _, cases = tiny_llava
    folder = tmp_path / "out"
    export_onnx(compiled(compiled_llava.program, cases, preset, *CUTS), folder, target="openvino")
    settings = json.loads((folder / "check.json").read_text())["runtime"]["settings"]
    runner = OnnxVLM(folder, threads=1)
    for graph in GRAPHS:
        name, path = graph.removesuffix(".onnx"), folder / graph
        if form == "ir":
            path = tmp_path / f"{graph}.xml"
            openvino.save_model(openvino.convert_model(folder / graph), path, compress_to_fp16=False)
        setattr(runner, name, Compared(getattr(runner, name), openvino.Core().read_model(path), settings))
    for case in cases.values():
        runner.generate(**arrays(case), max_new_tokens=4)
    compared: Any = runner
    assert compared.vision.runs == compared.prefill.runs == len(cases) and compared.decode.runs >= len(cases)


def test_a_4_bit_cache_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every byte of codes: OpenVINO rounds what it shifts."""
    import onnx_ir as ir
    from onnxscript import evaluator

    from qpcompile.emit.onnx.record import Recorder
    from qpcompile.kernels.kv_read.onnx import unpack_planes

    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    codes = ir.Value(name="codes", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([256]))
    model.graph.inputs.append(codes)
    with evaluator.default_as(Recorder(model.graph)):  # type: ignore[arg-type]
        model.graph.outputs.append(unpack_planes(codes, 512))
    ir.save(model, tmp_path / "planes.onnx")
    every = np.arange(256, dtype=np.uint8)
    compiled_model = openvino.Core().compile_model(tmp_path / "planes.onnx", "CPU")
    found = compiled_model.create_infer_request().infer({"codes": every})[0]
    assert np.array_equal(found, np.concatenate([every & 15, every >> 4]))
