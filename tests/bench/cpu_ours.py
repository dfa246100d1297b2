"""A compiled model as a worker of the CPU benchmark: cpu_ours.py FOLDER SHAPE NEW_TOKENS THREADS [INSTRUCTION_SET]

INSTRUCTION_SET restricts the operators in C to a lower set than the processor's best.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cpu_models import model_inputs
from cpu_shapes import SHAPES
from cpu_worker import Ask, Clock, folder_mb, serve

import qpcompile
from qpcompile.ir.program import DECODE, HEAD, Program
from qpcompile.kernels.native import library as native


def load(folder: Path, name: str, new_tokens: int, threads: int) -> tuple[Ask, dict[str, Any]]:
    """The artifact, and how many visual tokens its plan keeps."""
    torch.set_num_threads(threads)
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
    recipe = (folder / "recipe.yaml").read_text("utf-8")
    found = {"weights_mb": folder_mb(folder, "*.safetensors"), "step_mb": step_mb(model.program)}
    return ask, {**found, "settings": f"{settings}; {in_c()}", "recipe": recipe, "dtype": str(model.dtype)}


def step_mb(program: Program) -> float:
    """The weights that a decode step reads, in MB (10^6 bytes)."""
    graphs = [program.graphs[name] for name in (DECODE, HEAD) if name in program.graphs]
    tensors = {each.data_ptr(): each.nbytes for graph in graphs for each in graph.module.state_dict().values()}
    return sum(tensors.values()) / 1e6


def in_c() -> str:
    """The instruction set of the operators in C."""
    loaded = native.library()
    return loaded.problem or f"operators in C: {'amx' if loaded.amx else native.LEVELS[loaded.level]}"


if __name__ == "__main__":
    with native.instruction_set(sys.argv[5]) if len(sys.argv) > 5 else nullcontext():
        serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
