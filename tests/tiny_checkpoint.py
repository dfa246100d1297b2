"""A small random LLaVA in a folder, with the testbed's processor; tests damage copies of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig, LlavaForConditionalGeneration

TESTBED = Path(__file__).resolve().parent / "testbed" / "llava"
TOKENIZER = "tokenizer.json"
Tensors = dict[str, torch.Tensor]


def tiny_model() -> Any:
    """Three decoder layers, two vision layers, weights from a fixed seed."""
    config: Any = AutoConfig.from_pretrained(TESTBED)
    config.text_config.update({"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8})
    config.vision_config.update({"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32})
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig.from_pretrained(TESTBED)
    return model


def write_checkpoint(folder: Path) -> Path:
    """The model's folder with all files of the testbed's."""
    tiny_model().save_pretrained(folder)
    for path in TESTBED.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the weights."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **settings: Any) -> None:
    """Set keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
