"""OpenVINO GenAI as a worker of the CPU benchmark: cpu_openvino.py FOLDER SHAPE NEW_TOKENS THREADS KEEP

FOLDER is what cpu_openvino_export.py wrote. KEEP below 1 asks for its pruning (CDPruner). The prefix cache is off: a
repeated prompt would cost nothing. The precision of products and of the cache is the plug-in's default.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from cpu_shapes import SHAPES
from cpu_worker import Clock, folder_mb, serve


class Streamer(genai.StreamerBase):
    """Reports each token to the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def write(self, token: Any) -> Any:
        for one in token if isinstance(token, list) else [token]:
            self.clock.put(one)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing to flush."""


def load(folder: Path, name: str, new_tokens: int, threads: int, keep: float) -> Any:
    shape = SHAPES[name]
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    pipeline = genai.VLMPipeline(folder / "int4", "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)
    config = genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.apply_chat_template = False
    if keep < 1:
        config.pruning_ratio = round(100 * (1 - keep))
    # One letter is one token; the pipeline adds the picture's frame tokens.
    around = 2 if shape.family == "qwen2_vl" else 0
    text = "abcdefgh"[: 8 - around] + "<ov_genai_image_0>" + "x" * (shape.text_tokens - 8)

    def ask(question: dict[str, int]) -> dict[str, Any]:
        draw = np.random.default_rng(question["prompt"])
        picture = openvino.Tensor(draw.integers(0, 256, (1, shape.side, shape.side, 3), dtype=np.uint8))
        clock = Clock(prompt_first=False)
        results = pipeline.generate(text, images=[picture], generation_config=config, streamer=Streamer(clock))
        measured = results.perf_metrics
        return {
            **clock.result(),
            "prompt_tokens": measured.get_num_input_tokens(),
            "vision_ms": measured.get_prepare_embeddings_duration().mean,
        }

    settings = json.loads((folder / "settings.json").read_text("utf-8")) if (folder / "settings.json").exists() else {}
    read = folder_mb(folder / "int4", "openvino_language_model.bin")
    weights = folder_mb(folder / "int4", "openvino_*_model.bin")
    return ask, {"weights_mb": weights, "step_mb": read, "settings": settings}


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
