"""Full-precision accuracy of a model folder on unseen questions, and its blind score.

    python tests/testbed/evaluate.py tests/testbed/llava --count 1000 --seed 7

Runs the same code as a user: the folder's own processor and `model.generate`, greedy, on left-padded batches. An answer
is right when the generated text equals it. Blind: the same questions with the picture replaced by grey, or by noise.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qpcompile.capture.chat import about_picture, chat_inputs

Pixels = NDArray[np.uint8]

VIEWS: dict[str, Callable[[Pixels], Pixels]] = {
    "picture": lambda pixels: pixels,
    "grey": lambda pixels: np.full_like(pixels, 128),
    "noise": lambda pixels: np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8),
}


def answer(model: Any, processor: Any, pictures: list[Pixels], texts: list[str]) -> list[str]:
    """Generated answers to one question per picture."""
    asked = [about_picture(Image.fromarray(pixels), text) for pixels, text in zip(pictures, texts, strict=True)]
    inputs = {key: value.to(model.device) for key, value in chat_inputs(processor, asked, texts).items()}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Any, processor: Any, family: str, seed: int, count: int, view: str, batch: int = 50
) -> dict[str, tuple[int, int]]:
    """(right, asked) per kind of question."""
    right, asked = Counter[str](), Counter[str]()
    data = list(scenes.samples(family, seed, count))
    for first in range(0, count, batch):
        part = data[first : first + batch]
        pictures = [VIEWS[view](pixels) for pixels, _ in part]
        answers = answer(model, processor, pictures, [question.text for _, question in part])
        for (_, question), given in zip(part, answers, strict=True):
            asked[question.kind] += 1
            right[question.kind] += given == question.answer
    return {kind: (right[kind], asked[kind]) for kind in scenes.TEMPLATES}


def main() -> None:
    """Command line: prints one JSON object."""
    parser = argparse.ArgumentParser(description="Accuracy and blind score of a model folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--views", nargs="+", choices=sorted(VIEWS), default=["picture", "grey", "noise"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(options.folder).eval()
    processor = AutoProcessor.from_pretrained(options.folder)
    report: dict[str, object] = {"folder": options.folder.name, "count": options.count, "seed": options.seed}
    for view in options.views:
        kinds = accuracy(model, processor, model.config.model_type, options.seed, options.count, view)
        report[view] = round(sum(right for right, _ in kinds.values()) / options.count, 4)
        report[f"{view}_by_kind"] = {kind: f"{right}/{asked}" for kind, (right, asked) in kinds.items()}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
