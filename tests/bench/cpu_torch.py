"""Transformers as a worker of the CPU benchmark: cpu_torch.py FOLDER SHAPE NEW_TOKENS THREADS MODE

MODE is eager or compile.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from cpu_models import model_inputs
from cpu_shapes import SHAPES
from cpu_worker import Ask, Clock, folder_mb, serve
from transformers import AutoModelForImageTextToText


def load(folder: Path, name: str, new_tokens: int, threads: int, mode: str) -> tuple[Ask, dict[str, Any]]:
    """The model in its stored dtype; `compile` passes the vision tower and the decoder to torch.compile."""
    torch.set_num_threads(threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    if mode == "compile":
        # A static cache, as transformers' documentation recommends for torch.compile: no step recompiles.
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, dynamic=False)

    def ask(question: dict[str, int]) -> dict[str, Any]:
        inputs = model_inputs(SHAPES[name], question, model.dtype)
        clock = Clock()
        result = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, return_dict_in_generate=True
        )
        layers = result.past_key_values.layers
        return {**clock.result(), "kv_mb": sum(each.keys.nbytes + each.values.nbytes for each in layers) / 1e6}

    # A step reads one row of the embedding, and no tower.
    read = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    step_mb = sum(each.nbytes for each in read) / 1e6
    return ask, {"weights_mb": folder_mb(folder, "*.safetensors"), "step_mb": step_mb}


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
