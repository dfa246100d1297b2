"""The shapes of the CPU benchmark and their prompts, in numpy alone: every peer's environment imports this.

A and B are the two shapes of a 0.5B-class model: a tower of 768 x 12, a decoder of 1024 x 24 with 16 heads and an MLP
of 2816, 32,000 tokens, 576 visual tokens; A as LLaVA is built (CLIP tower), B as Qwen2-VL is (2,304 patches, merged by
four; 4 key-value heads). C is a smaller LLaVA, for the comparison with the original (cpu_original.py). `testbed` is the
LLaVA testbed with its trained weights. The tiny ones are for tests.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PAD, BEGIN, END = 0, 1, 2
# Ids from here on are text.
FIRST_TEXT = 20
VISION_START, VISION_END, VIDEO = 11, 12, 13
# Text tokens before the picture, including the two frame tokens of Qwen's picture.
BEFORE = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its prompt. `family` is llava or qwen2_vl; `side` is the picture's height in pixels."""

    name: str
    family: str
    side: int
    patch: int = 14
    tower: int = 768
    tower_layers: int = 12
    tower_heads: int = 12
    width: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    mlp: int = 2816
    vocabulary: int = 32000
    text_tokens: int = 64
    image_token: int = 10
    # A folder of the repository with trained weights, instead of random ones.
    folder: str = ""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that enter the decoder."""
        patches = (self.side // self.patch) ** 2
        return patches if self.family == "llava" else patches // 4

    def changed(self, **sizes: Any) -> "Shape":
        """The same with other sizes."""
        return replace(self, **sizes)


_SMALL: dict[str, Any] = {"tower": 32, "tower_layers": 2, "tower_heads": 4, "width": 64, "heads": 4, "mlp": 96}
_TINY: dict[str, Any] = {**_SMALL, "layers": 6, "vocabulary": 320, "text_tokens": 16}
_GROWTH: dict[str, Any] = {"tower": 256, "tower_layers": 4, "tower_heads": 4, "width": 512, "heads": 8, "kv_heads": 2}
_GROWTH |= {"mlp": 1408, "vocabulary": 8000}
_SMALLER: dict[str, Any] = {"width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "mlp": 2048}
_TESTBED: dict[str, Any] = {"patch": 8, "vocabulary": 80, "image_token": 4, "text_tokens": 32}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A", "llava", 336),
        Shape("B", "qwen2_vl", 672, kv_heads=4),
        Shape("C", "llava", 224, tower=384, tower_layers=4, tower_heads=6, **_SMALLER),
        Shape("testbed", "llava", 96, folder="tests/testbed/llava", layers=8, width=128, kv_heads=4, **_TESTBED),
        *(Shape(f"growth-{layers}", "qwen2_vl", 672, layers=layers, **_GROWTH) for layers in (4, 8, 16, 24)),
        Shape("tiny-A", "llava", 56, kv_heads=4, **_TINY),
        Shape("tiny-B", "qwen2_vl", 112, kv_heads=2, **_TINY),
    )
}


def asked_inputs(shape: Shape, question: dict[str, int]) -> dict[str, Array]:
    """The inputs of one question: the number of its prompt and, if they differ, the picture's height and the batch."""
    return inputs(shape.changed(side=question.get("side", shape.side)), question["prompt"], question.get("batch", 1))


def inputs(shape: Shape, seed: int = 0, batch: int = 1) -> dict[str, Array]:
    """The outputs of a processor: a picture of noise after a few text tokens, then the rest of the text."""
    draw = np.random.default_rng(seed)
    words = draw.integers(FIRST_TEXT, shape.vocabulary, (batch, shape.text_tokens))
    words[:, 0] = BEGIN
    if shape.family == "qwen2_vl":
        words[:, BEFORE - 1], words[:, BEFORE] = VISION_START, VISION_END
    picture = np.full((batch, shape.visual_tokens), shape.image_token)
    ids = np.concatenate([words[:, :BEFORE], picture, words[:, BEFORE:]], axis=1)
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if shape.family == "llava":
        return found | {"pixel_values": draw.standard_normal((batch, 3, shape.side, shape.side), np.float32)}
    rows = shape.side // shape.patch
    patches = draw.standard_normal((batch * rows * rows, 3 * 2 * shape.patch**2), np.float32)
    return found | {"pixel_values": patches, "image_grid_thw": np.array([[1, rows, rows]] * batch)}
