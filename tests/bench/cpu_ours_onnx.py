"""A compiled model's ONNX folder as a worker of the CPU benchmark: cpu_ours_onnx.py FOLDER SHAPE NEW_TOKENS THREADS

Without torch: the steps of the runner beside the graphs, with a timestamp after each token.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cpu_shapes import SHAPES, asked_inputs
from cpu_worker import STEP, Ask, Clock, folder_mb, serve

from qpcompile.emit.onnx.runner.runner import OnnxVLM, Steps


def load(folder: Path, name: str, new_tokens: int, threads: int) -> tuple[Ask, dict[str, Any]]:
    """The runner."""
    model = OnnxVLM(folder, threads=threads)

    def ask(question: dict[str, int]) -> dict[str, Any]:
        given = asked_inputs(SHAPES[name], question)
        ids, mask, grids = given["input_ids"], given["attention_mask"], given.get("image_grid_thw")
        clock = Clock(prompt_first=False)
        pictures = model.encode(given["pixel_values"], grids)
        steps = Steps(model, mask, model._positions(ids == model.image_token, mask, grids, ()))
        token = steps.prefill(ids, pictures).argmax(-1)
        clock.put(token)
        for _ in range(new_tokens - 1):
            token = steps.decode(token[:, None]).argmax(-1)
            clock.put(token)
        cache = [value for key, value in steps.state.items() if key.startswith("past_key_values.")]
        return {**clock.result(), "kv_mb": sum(value.numpy().nbytes for value in cache) / 1e6}

    step_mb = json.loads((folder / STEP).read_text("utf-8"))
    return ask, {"weights_mb": folder_mb(folder, "*.onnx", "*.data"), "step_mb": step_mb}


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
