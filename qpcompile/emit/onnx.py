"""A program becomes an ONNX folder that onnxruntime and numpy run on their own.

    vision.onnx   prefill.onnx   decode.onnx   weights.data    the graphs; weights they share are stored once
    runner.py     config.json    generation_config.json        what generates
    recipe.yaml   plan.yaml      manifest.json                 what was asked, what was decided, what every file is
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch

from qpcompile.emit import onnx_runner
from qpcompile.emit.onnx_attention import attention
from qpcompile.emit.onnx_example import decode_example, prefill_example, vision_example
from qpcompile.emit.onnx_lower import OPSET, Table, to_onnx
from qpcompile.emit.onnx_weights import save_models
from qpcompile.emit.onnx_wrap import Component, Language, vision
from qpcompile.errors import ExportError
from qpcompile.files import sha256, staged_folder
from qpcompile.ir.program import DECODE, HEAD, PREFILL, VISION, Program

if TYPE_CHECKING:
    from os import PathLike

    from qpcompile.emit.compiled import CompiledVLM

aten = torch.ops.aten
TRANSLATIONS: Table = {
    aten.scaled_dot_product_attention.default: attention,
}
PACKAGES = ("qpcompile", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(compiled: "CompiledVLM | Program", folder: "str | PathLike[str]") -> None:
    """Write the ONNX folder; it appears whole or not at all.

    Raises OutputError if `folder` exists and ExportError if the model cannot be written as ONNX, or the runner has
    no code for its inputs.
    """
    program = compiled if isinstance(compiled, Program) else compiled.program
    _check_supported(program)
    with staged_folder(folder) as aside:
        models = build_models(program)
        save_models(models, aside)
        for name in models:
            onnx.checker.check_model(str(aside / f"{name}.onnx"), full_check=True)
        _write_texts(program, aside)


def build_models(program: Program) -> dict[str, ir.Model]:
    """The three graphs of a program."""
    modules: dict[str, Component] = {
        VISION: vision(program),
        PREFILL: Language(program, PREFILL),
        DECODE: Language(program, DECODE),
    }
    for name, module in modules.items():
        _check_inputs(name, module)
    models: dict[str, ir.Model] = {}
    with torch.no_grad():
        pictures = vision_example(program, modules[VISION])
        (features,) = modules[VISION](*[pictures[path] for path in modules[VISION].inputs])
        models[VISION] = to_onnx(VISION, modules[VISION], pictures, TRANSLATIONS)
        prompt = prefill_example(program, features)
        results = modules[PREFILL](*[prompt[path] for path in modules[PREFILL].inputs])
        models[PREFILL] = to_onnx(PREFILL, modules[PREFILL], prompt, TRANSLATIONS)
        token = decode_example(modules[PREFILL], results, prompt)
        models[DECODE] = to_onnx(DECODE, modules[DECODE], token, TRANSLATIONS)
    return models


def _check_supported(program: Program) -> None:
    missing = [name for name in (VISION, PREFILL, DECODE, HEAD) if name not in program.graphs]
    if missing:
        raise ExportError(
            f"the program has no {', '.join(missing)} graph",
            where=type(program.host).__name__,
            do="use the compiled module: this family is not split in the way an ONNX folder is",
        )
    if program.host.dtype not in (torch.float32, torch.float16):
        raise ExportError(
            f"the model's type is {program.host.dtype}, which onnxruntime's CPU kernels do not have",
            where="dtype",
            do='load the model with dtype="float32" and compile again',
        )


def _check_inputs(name: str, module: Component) -> None:
    known = onnx_runner.VISION_INPUTS if name == VISION else onnx_runner.LANGUAGE_INPUTS
    unknown = [path for path in module.inputs if path not in known and path.split(".")[0] not in onnx_runner.STATE]
    if unknown:
        raise ExportError(
            f"the {name} graph takes inputs that the ONNX runner cannot compute: {', '.join(unknown)}",
            where=name,
            do="use the compiled module: the ONNX runner has no code for this family",
        )


def _write_texts(program: Program, folder: Path) -> None:
    """Everything in the folder that is text; the manifest comes last and names all files."""
    shutil.copyfile(onnx_runner.__file__, folder / "runner.py")
    # Some families store the id of image tokens under another name; the runner looks for one.
    config = program.host.config.to_dict() | {"image_token_id": program.host.config.image_token_id}
    texts = {
        "config.json": json.dumps(config, indent=2, sort_keys=True, default=str) + "\n",
        "generation_config.json": program.host.generation_config.to_json_string(use_diff=False),
        "recipe.yaml": program.recipe.to_yaml(),
        "plan.yaml": program.plan.to_yaml(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    manifest = {
        "format": "qpcompile-onnx",
        "version": 1,
        "opset": OPSET,
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
