"""Build what one peer of the CPU benchmark loads: cpu_prepare.py WHAT SHAPE FOLDER [SOURCE]

WHAT is torch:DTYPE, ours:DTYPE (a folder for each preset), onnx:PRESET and onnx-fast:PRESET from the compiled models in
SOURCE, or ort:fp32, ort:int4 and ort:int4:fast: the model's own graphs for onnxruntime, the others with weights from
onnxruntime's MatMulNBits quantizer (blocks of 32, int8 arithmetic), the last with onnxruntime's fused attention and
caches in place.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_models import build, model_inputs
from cpu_shapes import SHAPES, Shape
from transformers import PreTrainedModel

import qpcompile
from qpcompile.capture.samples import Source
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.recipe.recipe import Recipe

PRESETS = ("w4a4kv4", "quota-30")
# Training on random weights is pointless, so a compile here does only what takes seconds: the operators that run, and
# therefore the time of an answer, are those of the preset.
QUICK = (
    "calibration.samples=2",
    "quantize.weights.solver=rtn",
    "quantize.weights.clip_search=false",
    "quantize.activations.clip_search=false",
    "quantize.training.epochs=0",
)
# Random attention is uniform, and the search for candidate layers refuses it.
LAYERS = "tokens.candidate_layers=[2, 3, 4, 5, 6]"


def recipe(shape: Shape, preset: str) -> Recipe:
    """The preset with the settings of this benchmark."""
    found = Recipe.load(preset)
    overrides = [*QUICK]
    if found.tokens.method != "none":
        overrides.append("tokens.candidate_layers=[0]" if shape.layers < 8 else LAYERS)
    return found.with_overrides(overrides)


def prepare_torch(shape: Shape, folder: Path, dtype: str) -> None:
    """The model's own folder."""
    build(shape).to(getattr(torch, dtype)).save_pretrained(folder)


class Bench(Workbench):
    """Compile presets of an in-memory model on random samples."""

    def __init__(self, model: PreTrainedModel, samples: Source) -> None:
        self.model, self.processor, self.calibration = model, None, samples
        self._captured, self._shared, self._sensitivity = None, None, {}


def prepare_ours(shape: Shape, folder: Path, dtype: str) -> None:
    """A folder with the compiled model of each preset."""
    model = build(shape).to(getattr(torch, dtype))
    samples: list[dict[str, Any]] = [model_inputs(shape, {"prompt": n}, model.dtype) for n in (101, 102)]
    bench = Bench(model, samples)
    for preset in PRESETS:
        bench.compile(recipe(shape, preset)).save_pretrained(folder / preset)


def prepare_onnx(shape: Shape, folder: Path, preset: str, source: str, fast: bool = False) -> None:
    """The ONNX folder of a compiled model."""
    qpcompile.load(Path(source) / preset).export_onnx(folder, fast=fast)


def prepare_ort(shape: Shape, folder: Path, weights: str, how: str = "") -> None:
    """The unquantized model in ONNX; int4 by onnxruntime's own tool, at its default settings but for the block size."""
    samples = [model_inputs(shape, {"prompt": 101})]
    qpcompile.compile(build(shape), "none", calibration=samples).export_onnx(folder, fast=how == "fast")
    if weights == "fp32":
        return
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for path in sorted(folder.glob("*.onnx")):
        quantizer = MatMulNBitsQuantizer(onnx.load(path), 4, 32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        path.unlink()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=True)  # type: ignore[union-attr]
    (folder / "weights.data").unlink()


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
