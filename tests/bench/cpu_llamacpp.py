"""llama.cpp as a worker of the CPU benchmark: cpu_llamacpp.py FOLDER SHAPE NEW_TOKENS THREADS TYPE

FOLDER is what cpu_llamacpp_export.py wrote, TYPE the decoder's file in it. llamacpp/answer.cpp has the functions; each
prompt begins with an empty cache. The cache's type, the attention and the size of a batch are llama.cpp's defaults.
"""

import ctypes
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cpu_install import BUILD_NUMBER
from cpu_peers import BUILD, LLAMACPP
from cpu_shapes import BEFORE, SHAPES
from cpu_worker import STEP, Ask, Clock, folder_mb, serve

MARKER = "<__media__>"
TEXT = ctypes.c_char_p


@cache
def library() -> ctypes.CDLL:
    """The functions of answer.cpp."""
    loaded = ctypes.CDLL(str(BUILD / LLAMACPP / "compiled" / "libanswer.so"))
    loaded.answer_load.restype = ctypes.c_void_p
    loaded.answer_load.argtypes = TEXT, TEXT, ctypes.c_int, ctypes.c_int
    for name in ("answer_count", "answer_first"):
        getattr(loaded, name).argtypes = ctypes.c_void_p, TEXT, TEXT, ctypes.c_uint
    loaded.answer_next.argtypes = ctypes.c_void_p, ctypes.c_int
    loaded.answer_quantize.argtypes = TEXT, TEXT, TEXT
    return loaded


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF file in another type."""
    told(library().answer_quantize(bytes(source), bytes(target), kind.encode()))


def told(number: int) -> int:
    """A result; negative ones are errors."""
    if number < 0:
        raise RuntimeError("llama.cpp failed; what it said stands above this line")
    return number


def load(folder: Path, name: str, new_tokens: int, threads: int, kind: str) -> tuple[Ask, dict[str, Any]]:
    """The model in this process."""
    shape = SHAPES[name]
    tokens = shape.visual_tokens + shape.text_tokens
    files = folder / f"{kind}.gguf", folder / "projector.gguf"
    model = library().answer_load(*(bytes(file) for file in files), threads, tokens + new_tokens + 64)
    if model is None:
        raise RuntimeError("llama.cpp did not load the model; what it said stands above this line")

    def prompt(letters: int) -> bytes:
        return ("a" * BEFORE + MARKER + "x" * letters).encode()

    # One letter is one token, and the model's own frame around them is what is left.
    blank = bytes(3 * shape.side**2)
    frame = told(library().answer_count(model, prompt(1), blank, shape.side)) - 1
    text = prompt(tokens - frame)

    def ask(question: dict[str, int]) -> dict[str, Any]:
        draw = np.random.default_rng(question["prompt"])
        picture = draw.integers(0, 256, (shape.side, shape.side, 3), dtype=np.uint8).tobytes()
        clock = Clock(prompt_first=False)
        token = told(library().answer_first(model, text, picture, shape.side))
        clock.put(token)
        for _ in range(new_tokens - 1):
            token = told(library().answer_next(model, token))
            clock.put(token)
        return {**clock.result(), "prompt_tokens": told(library().answer_count(model, text, picture, shape.side))}

    step = json.loads((folder / STEP).read_text("utf-8"))[kind]
    found = {"weights_mb": sum(folder_mb(folder, file.name) for file in files), "step_mb": step}
    return ask, {**found, "settings": f"{kind}, projector Q8_0, f16 cache", "versions": {"llama.cpp": BUILD_NUMBER}}


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
