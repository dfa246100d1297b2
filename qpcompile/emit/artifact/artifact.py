"""The artifact folder: a compiled model as safetensors and text, fully verified before it is loaded.

config.json  generation_config.json  processor and tokenizer files     as Hugging Face writes them
recipe.yaml  plan.yaml                                                  options, decisions
graph/<name>.json  graph/<name>.txt                                     to load, to read
model-00001-of-0000N.safetensors  model.safetensors.index.json          every tensor once
manifest.json                                                           hashes, versions, quantized sites
README.md                                                               model card
"""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel

from qpcompile.emit.artifact import json_text
from qpcompile.emit.artifact.agreement import check_agreement, check_counts
from qpcompile.emit.artifact.auto_config import register_config
from qpcompile.emit.artifact.folder import AGAIN, files, read_text, reading
from qpcompile.emit.artifact.graph_json import read_graph, write_graph
from qpcompile.emit.artifact.manifest import Manifest, read_manifest, refuse_files, write_manifest
from qpcompile.emit.artifact.model_card import model_card
from qpcompile.emit.artifact.settings import (
    CONFIG,
    check_settings,
    class_of,
    leave_out_leads,
    read_config,
    write_config,
)
from qpcompile.emit.artifact.template.chat_template import check_templates
from qpcompile.emit.artifact.tokenizer_file import check_tokenizers
from qpcompile.emit.artifact.weights import StoredTensors, read_weights, stored_tensors, total_bytes, write_weights
from qpcompile.errors import ArtifactError, ExportError
from qpcompile.files import staged_folder
from qpcompile.ir.program import Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.type_check import check_graphs
from qpcompile.kernels.rules import described
from qpcompile.recipe.plan import Layer, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.host import empty_host, fill_host, host_tensors


def save(program: Program, processor: Any, folder: str | PathLike[str]) -> None:
    """Write the artifact folder of a program atomically.

    Raises OutputError for an existing folder or a full disk, ExportError for a model that could not be loaded again.
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
        _refuse_unreadable(out)
        write_manifest(out, _facts(program, processor, stored))


def load(folder: Path) -> tuple[Program, Any]:
    """Load the program and the processor saved in `folder`, after checking every hash; no code in it is run.

    Raises ArtifactError naming the file that is missing, modified, of another version, or must not be loaded.
    """
    with reading("the artifact", folder):
        manifest = read_manifest(folder)
        check_settings(folder, list(manifest.files))
        check_templates(folder, list(manifest.files))
        check_tokenizers(folder, list(manifest.files))
        tensors = read_weights(folder, manifest.files)
        program = _program(folder, manifest, tensors)
        check_graphs(program.graphs)
        check_agreement(program, manifest)
        return program, _processor(folder, manifest.processor)


def _program(folder: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> Program:
    recipe = Recipe.from_yaml(read_text(folder / "recipe.yaml"), where="recipe.yaml")
    plan = Plan.from_yaml(read_text(folder / "plan.yaml"), where="plan.yaml")
    graphs = {
        name: read_graph(
            read_text(folder / "graph" / f"{name}.json", json_text.MOST_BYTES), tensors, f"graph/{name}.json"
        )
        for name in manifest.graphs
    }
    missing = [key for key in manifest.host.values() if key not in tensors]
    if missing:
        raise ArtifactError(f"the tensor {missing[0]!r:.80} is not stored", where="manifest.json, host", do=AGAIN)
    host = _host(folder, manifest, {name: tensors[key] for name, key in manifest.host.items()})
    layers = tuple(Layer(index=index, name=name) for index, name in enumerate(manifest.layers))
    return Program(graphs, host, layers, recipe, plan, manifest.stage, history=list(manifest.history))


def _write_settings(program: Program, processor: Any, out: Path) -> None:
    """Write everything except graphs and tensors."""
    host: Any = program.host
    class_of(type(host).__name__, PreTrainedModel, ExportError, CONFIG)
    config = copy.deepcopy(host.config)
    config.architectures = [type(host).__name__]
    write_config(config, out)
    host.generation_config.save_pretrained(out)
    if processor is not None:
        class_of(type(processor).__name__, object, ExportError, "the processor")
        processor.save_pretrained(out)
    leave_out_leads(out)
    _write(out / "recipe.yaml", program.recipe.to_yaml())
    plan = program.plan.to_yaml()
    # Passes may have modified the plan without validation; an unloadable plan is not written.
    Plan.from_yaml(plan, where="the plan of the program")
    _write(out / "plan.yaml", plan)


def _refuse_unreadable(out: Path) -> None:
    """Refuse to write anything that loading would refuse."""
    refuse_files(out, ExportError)
    try:
        check_settings(out, files(out))
        check_templates(out, files(out))
        check_tokenizers(out, files(out))
    except ArtifactError as error:
        raise ExportError(f"the model could not be loaded again: {error.what}", where=error.where) from error


def _facts(program: Program, processor: Any, stored: StoredTensors) -> dict[str, Any]:
    """The facts that no other file contains."""
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


def _host(folder: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    model_class = class_of(manifest.model_class, PreTrainedModel, ArtifactError, CONFIG)
    config = read_config(model_class, folder)
    check_counts(config, len(manifest.layers))
    config._attn_implementation = manifest.attention
    host = empty_host(model_class, config)
    own = host_tensors(host, set())
    for name, tensor in tensors.items():
        wanted = own.get(name)
        if wanted is None or wanted.shape != tensor.shape or wanted.is_floating_point() != tensor.is_floating_point():
            is_there = "no such tensor" if wanted is None else described(wanted)
            raise ArtifactError(
                f"the weight {name} is {described(tensor)}; by config.json the host has {is_there}",
                where="manifest.json, host",
                do=AGAIN,
            )
    host = fill_host(host, tensors, getattr(torch, manifest.dtype))
    host.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return host


def _processor(folder: Path, name: str | None) -> Any:
    if name is None:
        return None
    do = "save the model again with its processor"
    # transformers looks at config.json for the tokenizer's class, and warns about a type that it does not know.
    register_config()
    with reading("the processor", folder / "processor_config.json", do):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if type(processor).__name__ != name:
            raise ValueError(f"it is a {type(processor).__name__}, manifest.json says {name}")
    return processor


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
