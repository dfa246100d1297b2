"""The artifact folder: a compiled model as safetensors and text, checked in full before anything is read.

config.json  generation_config.json  processor and tokenizer files     as Hugging Face writes them
recipe.yaml  plan.yaml                                                  asked, decided
graph/<name>.json  graph/<name>.txt                                     to load, to read
model-00001-of-0000N.safetensors  model.safetensors.index.json          every tensor once
manifest.json                                                           hashes, versions, what each site became
README.md                                                               model card
"""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel

from qpcompile.emit.graph_json import read_graph, write_graph
from qpcompile.emit.manifest import read_manifest, refuse_files, write_manifest
from qpcompile.emit.model_card import model_card
from qpcompile.emit.weights import StoredTensors, read_weights, stored_tensors, total_bytes, write_weights
from qpcompile.errors import ArtifactError, ExportError, PlanError, RecipeError
from qpcompile.files import staged_folder
from qpcompile.ir.host import empty_host, fill_host
from qpcompile.ir.program import STAGES, Layer, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.value_types import check_values
from qpcompile.kernels.rules import described
from qpcompile.plan import Plan
from qpcompile.recipe import Recipe


def save(program: Program, processor: Any, folder: str | PathLike[str]) -> None:
    """Write the artifact folder of a program; it appears whole or not at all.

    Raises OutputError for a folder that exists or a full disk, ExportError for a model that could not be loaded again.
    """
    stored = stored_tensors(program)
    with staged_folder(folder, needed=total_bytes(stored)) as out:
        _write_settings(program, processor, out)
        graphs = out / "graph"
        graphs.mkdir()
        for name, graph in program.graphs.items():
            _write(graphs / f"{name}.json", write_graph(graph, stored.graphs[name]))
            _write(graphs / f"{name}.txt", graph_text(graph))
        write_weights(stored.tensors, out)
        _write(out / "README.md", model_card(program, total_bytes(stored)))
        refuse_files(out, ExportError)
        write_manifest(out, _facts(program, processor, stored))


def load(folder: Path) -> tuple[Program, Any]:
    """The program and the processor saved in `folder`, after every hash was checked; no code in it is run.

    Raises ArtifactError naming the file that is missing, altered, of another version, or must not be loaded.
    """
    facts = read_manifest(folder)
    tensors = read_weights(folder)
    try:
        recipe = Recipe.from_yaml(_read(folder / "recipe.yaml"), where="recipe.yaml")
        plan = Plan.from_yaml(_read(folder / "plan.yaml"), where="plan.yaml")
        graphs = {
            name: read_graph(_read(folder / "graph" / f"{name}.json"), tensors, f"graph/{name}.json")
            for name in facts["graphs"]
        }
        host = _host(folder, facts, {name: tensors[key] for name, key in facts["host"].items()})
        layers = tuple(Layer(index, name) for index, name in enumerate(facts["layers"]))
        stage = STAGES[STAGES.index(facts["stage"])]
    except (KeyError, TypeError, ValueError, RecipeError, PlanError) as error:
        raise ArtifactError(
            f"the artifact contradicts itself: {type(error).__name__}: {error}",
            where=str(folder),
            do="save the model again with this version",
        ) from error
    for graph in graphs.values():
        check_values(graph)
    program = Program(graphs, host, layers, recipe, plan, stage, history=list(facts["history"]))
    return program, _processor(folder) if facts["processor"] else None


def _write_settings(program: Program, processor: Any, out: Path) -> None:
    """Everything that is neither a graph nor a tensor."""
    host: Any = program.host
    _model_class(type(host).__name__, ExportError)
    config = copy.deepcopy(host.config)
    config.architectures = [type(host).__name__]
    config.save_pretrained(out)
    host.generation_config.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    _write(out / "recipe.yaml", program.recipe.to_yaml())
    plan = program.plan.to_yaml()
    # Passes may have changed the plan without its checks; what could not be loaded again is not written.
    Plan.from_yaml(plan, where="the plan of the program")
    _write(out / "plan.yaml", plan)


def _facts(program: Program, processor: Any, stored: StoredTensors) -> dict[str, Any]:
    """What the other files do not say."""
    host: Any = program.host
    return {
        "model_class": type(host).__name__,
        "dtype": str(host.dtype).removeprefix("torch."),
        "attention": host.config._attn_implementation,
        "processor": None if processor is None else type(processor).__name__,
        "stage": program.stage,
        "history": list(program.history),
        "layers": [layer.name for layer in program.layers],
        "graphs": list(program.graphs),
        "host": stored.host,
        "sites": [site.model_dump(mode="json", exclude_none=True) for site in program.plan.sites],
        "left_out": [site.model_dump(mode="json") for site in program.plan.left_out],
    }


def _host(folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    model_class = _model_class(facts["model_class"], ArtifactError)
    config: Any = model_class.config_class
    config = config.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = facts["attention"]
    dtype = getattr(torch, facts["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{facts['dtype']} is no type of numbers")
    host = empty_host(model_class, config)
    _check_host(host, tensors)
    host = fill_host(host, tensors, dtype)
    host.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return host


def _check_host(host: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not of the sizes that config.json gives them."""
    for name, parameter in host.named_parameters(remove_duplicate=False):
        tensor = tensors.get(name, parameter)
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise ArtifactError(
                f"the weight {name} is {described(tensor)}; config.json makes it {described(parameter)}",
                where="manifest.json, host",
                do="save the model again; do not use this folder",
            )


def _model_class(name: str, error: type[ArtifactError] | type[ExportError]) -> type[PreTrainedModel]:
    """The class of this name in transformers; never code that came with a model."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise error(
            f"transformers {transformers.__version__} has no model class {name}",
            where="config.json",
            do="use a model family that is part of transformers, and the version the model was saved with",
        )
    return found


def _processor(folder: Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the processor cannot be loaded: {error}",
            where=str(folder / "processor_config.json"),
            do="save the model again with its processor",
        ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the file cannot be read: {error}", where=str(path), do="save the model again") from error
