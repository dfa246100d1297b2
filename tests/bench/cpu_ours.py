"""A compiled model as a worker of the CPU benchmark: cpu_ours.py FOLDER SHAPE NEW_TOKENS"""

import sys
from pathlib import Path
from typing import Any

import torch
from cpu_models import model_inputs
from cpu_shapes import SHAPES
from cpu_worker import Ask, Clock, folder_mb, serve

import qpcompile


def load(folder: Path, name: str, new_tokens: int) -> tuple[Ask, dict[str, Any]]:
    """The artifact, and how many visual tokens its plan keeps."""
    torch.set_num_threads(1)
    model = qpcompile.load(folder)
    model.generation_config.eos_token_id = None

    def ask(question: dict[str, int]) -> dict[str, Any]:
        inputs = model_inputs(SHAPES[name], question, model.dtype)
        clock = Clock()
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        cache = model.machine.last
        assert cache is not None
        return {**clock.result(), "kv_mb": cache.nbytes() / 1e6}

    counts = model.plan.visual_tokens(SHAPES[name].visual_tokens)
    settings = f"{sum(counts) / len(counts):.0f} visual tokens in the mean layer, {counts[-1]} in the last"
    return ask, {"weights_mb": folder_mb(folder, "*.safetensors"), "settings": settings}


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
