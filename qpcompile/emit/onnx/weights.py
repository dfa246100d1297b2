"""Store the weights of several ONNX graphs in one data file, shared ones once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

DATA = "weights.data"
SMALL = 1024  # bytes; smaller tensors stay in the graph's own file
LARGE, PAGE, LINE = 2**20, 4096, 64  # runtimes memory-map large tensors: page-aligned


def save_models(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write `<name>.onnx` for each model and `weights.data` for all of them."""
    places: dict[str, tuple[int, int]] = {}
    with open(folder / DATA, "wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes < SMALL:
                    continue
                data = tensor.tobytes()
                key = hashlib.sha256(data).hexdigest()
                if key not in places:
                    file.seek(-file.tell() % (PAGE if len(data) >= LARGE else LINE), 1)
                    places[key] = (file.tell(), len(data))
                    file.write(data)
                value.const_value = ir.ExternalTensor(
                    DATA,
                    *places[key],
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=folder,
                )
    for name, model in models.items():
        ir.save(model, folder / f"{name}.onnx")
