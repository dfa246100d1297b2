"""Training batches: one picture, several questions about it in one sequence, none of which sees another.

The shared part is `before_image picture after_image`; each question is `words after_question answer`, and its positions
start again after the shared part.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import scenes
import torch
from architectures import DIALECTS, build_tokenizer
from numpy.typing import NDArray
from torch import Tensor

CATEGORIES = (tuple(scenes.COLORS), scenes.SHAPES, scenes.DIGITS, scenes.ZONES)


@dataclass(frozen=True)
class Batch:
    """B pictures of one size with their patch labels and packed questions; all tensors are int64 but the pixels."""

    pixels: Tensor  # u8[B, H, W, 3]
    labels: Tensor  # [B, N, 4]: word ids of colour, shape, digit and zone, or of "background" four times
    ids: Tensor  # [B, T]: the text after the picture
    segment: Tensor  # [B, T]: 0 shared, 1.. one per question, -1 padding
    offset: Tensor  # [B, T]: position relative to the first token after the picture
    ask_row: Tensor  # [A]: where answers are predicted: row ...
    ask_column: Tensor  # [A]: ... and column of `ids`
    target: Tensor  # [A]: the token to be predicted there


@cache
def table(family: str) -> dict[str, int]:
    """Word or special token -> id."""
    return build_tokenizer(family).get_vocab()


@cache
def category_ids(family: str) -> tuple[Tensor, ...]:
    """Per category of patch label: the ids of its words, "background" last."""
    ids = table(family)
    return tuple(torch.tensor([ids[word] for word in (*words, scenes.BACKGROUND)]) for words in CATEGORIES)


@cache
def _label_row(family: str, words: tuple[str, ...] | None) -> tuple[int, ...]:
    return tuple(table(family)[word] for word in words or (scenes.BACKGROUND,) * 4)


@cache
def _question_ids(family: str, text: str, answer: str) -> tuple[int, ...]:
    words = text.replace("?", " ?").split()
    return tuple(table(family)[word] for word in (*words, *DIALECTS[family].after_question, answer))


def make_batch(
    family: str,
    seed: tuple[int, ...],
    pictures: int,
    questions: int,
    things: tuple[int, int] = (4, 6),
    smallest: bool = False,
    weights: NDArray[np.float64] = scenes.WEIGHTS,
) -> Batch:
    """A batch determined by its arguments alone; with `questions=0` only pictures and patch labels."""
    rng = np.random.default_rng(seed)
    sizes = scenes.SIZES[family][: 1 if smallest else None]
    height, width = sizes[rng.integers(len(sizes))]
    ids, dialect = table(family), DIALECTS[family]
    shared = [ids[word] for word in dialect.after_image]
    end = ids[dialect.end]
    pixels, labels, texts, asks = [], [], [], []
    for row in range(pictures):
        scene = scenes.random_scene(rng, height, width, *things)
        pixels.append(scenes.render(scene, rng))
        labels.append([_label_row(family, words) for words in scenes.token_words(scene)])
        text = [(word, 0, place) for place, word in enumerate(shared)]
        for segment in range(1, questions + 1):
            question = scenes.ask(scene, rng, weights)
            words = _question_ids(family, question.text, question.answer)
            asks += [(row, len(text) + len(words) - 2, words[-1]), (row, len(text) + len(words) - 1, end)]
            text += [(word, segment, len(shared) + place) for place, word in enumerate(words)]
        texts.append(text)
    longest = max(map(len, texts))
    padded = torch.tensor([text + [(0, -1, 0)] * (longest - len(text)) for text in texts], dtype=torch.int64)
    padded = padded.reshape(pictures, longest, 3)
    ask = torch.tensor(asks, dtype=torch.int64).reshape(-1, 3)
    return Batch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), *padded.unbind(2), *ask.unbind(1))


def choose_tokens(labels: Tensor, background: int, keep: int, generator: torch.Generator) -> Tensor:
    """Indices [B, keep] of all object tokens and some random background ones, in raster order."""
    is_object = (labels[:, :, 0] != background).float()
    order = torch.rand(is_object.shape, generator=generator) + is_object
    return order.topk(min(keep, labels.shape[1]), dim=1).indices.sort(dim=1).values


def picture_positions(family: str, height: int, width: int) -> tuple[Tensor, int]:
    """Position ids of the visual tokens, [axes, N], and of the first token after them."""
    start = len(DIALECTS[family].before_image)
    rows, columns = height // scenes.TOKEN, width // scenes.TOKEN
    if family == "llava":
        return start + torch.arange(rows * columns)[None], start + rows * columns
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column]).flatten(1)  # M-RoPE: time, height, width
    return start + places, start + max(rows, columns)


def attention_mask(segment: Tensor, prefix: int) -> Tensor:
    """f32[B, 1, L, L], L = prefix + T, to be added: causal, and a question sees only the shared part and itself."""
    whole = torch.nn.functional.pad(segment, (prefix, 0))
    length = whole.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (whole[:, None, :] == 0) | (whole[:, None, :] == whole[:, :, None])
    hidden = ~(visible & causal)[:, None]
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
