"""Build what one peer of the CPU benchmark loads: cpu_prepare.py WHAT SHAPE FOLDER [SOURCE]

WHAT is torch:DTYPE, ours:DTYPE:PRESETS (a folder for each preset, separated by commas), onnx:PRESET and
onnx-fast:PRESET from the compiled models in SOURCE, or ort:fp32, ort:int4 and ort:int4:fast: the model's own graphs for
onnxruntime, the others with weights from onnxruntime's MatMulNBits quantizer (blocks of 32, int8 arithmetic), the last
with onnxruntime's fused attention and caches in place.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from cpu_models import build, model_inputs
from cpu_shapes import SHAPES, Shape
from cpu_worker import STEP
from onnx import TensorProto
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import PreTrainedModel

import qpcompile
from qpcompile.capture.samples import Source
from qpcompile.emit.manifest_text import sealed
from qpcompile.emit.onnx.runner.folder import MANIFEST
from qpcompile.emit.onnx.weights import DATA as WEIGHTS
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.files import sha256
from qpcompile.recipe.recipe import Recipe

# Presets with changes, by the name of their folder.
CHANGED = {"w4a8kv4": ("w4a4kv4", "quantize.activations.bits=8")}
# Training on random weights is pointless, so a compile here does only what takes seconds: the operators that run, and
# therefore the time of an answer, are those of the preset.
QUICK = (
    "calibration.samples=2",
    "quantize.weights.solver=rtn",
    "quantize.weights.clip_search=false",
    "quantize.activations.clip_search=false",
    "quantize.training.epochs=0",
)
# Bits of an element in ONNX; the other types have 32.
ITEM_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4), 4),
    **dict.fromkeys((TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL), 8),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16), 16),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64), 64),
}
# Random attention is uniform, and the search for candidate layers refuses it.
LAYERS = "tokens.candidate_layers=[2, 3, 4, 5, 6]"


def recipe(shape: Shape, preset: str) -> Recipe:
    """The preset with the settings of this benchmark."""
    preset, *changes = CHANGED.get(preset, (preset,))
    found = Recipe.load(preset)
    overrides = [*QUICK, *changes]
    if found.tokens.method != "none":
        overrides.append("tokens.candidate_layers=[0]" if shape.layers < 8 else LAYERS)
    return found.with_overrides(overrides)


def prepare_torch(shape: Shape, folder: Path, dtype: str) -> None:
    """The model's own folder."""
    build(shape).to(getattr(torch, dtype)).save_pretrained(folder)


class Bench(Workbench):
    """Compile presets of an in-memory model on random samples."""

    def __init__(self, model: PreTrainedModel, samples: Source) -> None:
        self.model, self.processor, self.calibration, self.device = model, None, samples, None
        self.grids, self._captured, self._shared, self._sensitivity = {}, None, None, {}


def prepare_ours(shape: Shape, folder: Path, dtype: str, presets: str) -> None:
    """A folder with the compiled model of each preset."""
    model = build(shape).to(getattr(torch, dtype))
    samples: list[dict[str, Any]] = [model_inputs(shape, {"prompt": n}, model.dtype) for n in (101, 102)]
    bench = Bench(model, samples)
    for preset in presets.split(","):
        bench.compile(recipe(shape, preset)).save_pretrained(folder / preset)


def prepare_onnx(shape: Shape, folder: Path, preset: str, source: str, fast: bool = False) -> None:
    """The ONNX folder of a compiled model."""
    qpcompile.load(Path(source) / preset).export_onnx(folder, fast=fast)
    write_step(folder)


def prepare_ort(shape: Shape, folder: Path, weights: str, how: str = "") -> None:
    """The unquantized model in ONNX; int4 by onnxruntime's own tool, at its default settings but for the block size."""
    samples = [model_inputs(shape, {"prompt": 101})]
    qpcompile.compile(build(shape), "none", calibration=samples).export_onnx(folder, fast=how == "fast")
    if weights == "int4":
        quantize_ort(folder)
    write_step(folder)


def quantize_ort(folder: Path) -> None:
    """int4 weights in place, in the layout that the runner checks: one weights file, and a manifest of all files."""
    models = {}
    for path in sorted(folder.glob("*.onnx")):
        quantizer = MatMulNBitsQuantizer(onnx.load(path), 4, 32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        models[path] = quantizer.model.model  # type: ignore[union-attr]
    (folder / WEIGHTS).unlink()
    for path, model in models.items():
        # Each graph's weights are appended.
        onnx.save(model, path, save_as_external_data=True, location=WEIGHTS)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in manifest["files"]
    }
    (folder / MANIFEST).write_text(sealed(manifest), "utf-8")


def write_step(folder: Path) -> None:
    """Note the weights that a decode step reads, in MB (10^6 bytes): all but embeddings, of which it reads a row."""
    graph = onnx.load(folder / "decode.onnx", load_external_data=False).graph
    rows = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    sizes = [
        math.prod(each.dims) * ITEM_BITS.get(each.data_type, 32) / 8
        for each in graph.initializer
        if each.name not in rows
    ]
    (folder / STEP).write_text(json.dumps(sum(sizes) / 1e6), "utf-8")


MAKERS: dict[str, Callable[..., None]] = {
    "torch": prepare_torch,
    "ours": prepare_ours,
    "onnx": prepare_onnx,
    "onnx-fast": partial(prepare_onnx, fast=True),
    "ort": prepare_ort,
}


def main(what: str, shape: str, folder: str, *source: str) -> None:
    """Write to a temporary folder first: an existing folder is complete."""
    torch.set_num_threads(1)
    kind, *arguments = what.split(":")
    unfinished = Path(f"{folder}.unfinished")
    MAKERS[kind](SHAPES[shape], unfinished, *arguments, *source)
    unfinished.rename(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
