"""A graph with `aten::cosh` is exported and runs in onnxruntime, at sizes it was not translated with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
from onnx_ir import serde
from torch import fx

from qpcompile.emit.onnx.export import OWN, TORCH
from qpcompile.emit.onnx.runner.folder import check_graph
from qpcompile.emit.onnx.translate.nodes import to_onnx
from qpcompile.emit.onnx.wrap import Part

aten = torch.ops.aten
part = Part(fx.symbolic_trace(lambda x: (aten.cosh.default(x),)), ("x",), ("y",))
model = to_onnx("test", part, ({"x": torch.ones(2, 3)}, {"x": torch.ones(4, 5)}), (TORCH, OWN))
data = serde.serialize_model(model).SerializeToString()

x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
(found,) = onnxruntime.InferenceSession(data).run(None, {"x": x.numpy()})
torch.testing.assert_close(torch.from_numpy(found), x.cosh())

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "test.onnx")
    path.write_bytes(data)
    check_graph(path, weights=0)  # the runner lets its operators through
