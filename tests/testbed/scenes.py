"""Rendered scenes with exact ground truth, and one-word questions about them.

A scene is a grid of 16 x 16 px cells. Four to six cells hold an object: a coloured shape with a small digit on it.
The background brightens to one side and tints to another, so that a patch shows its position in the picture.

    python tests/testbed/scenes.py --count 1000 --seed 7 --family llava --out data/

Everything is determined by (seed, index): the same pair gives the same picture and the same questions.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CELL = 16
TOKEN = 8  # pixels covered by one visual token in both families; a cell is 2 x 2 tokens
SPRITE = 14

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (35, 150, 50),
    "blue": (45, 70, 215),
    "yellow": (240, 220, 45),
    "purple": (150, 45, 180),
    "cyan": (50, 210, 220),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "arrow")
DIGITS = tuple("0123456789")
ZONES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
BACKGROUND = "background"

SIZES: dict[str, tuple[tuple[int, int], ...]] = {  # (height, width) of the pictures each family is trained on
    "llava": ((96, 96),),
    "qwen2_5_vl": tuple((height, width) for height in (96, 112, 128) for width in (96, 112, 128)),
}

TEMPLATES = {
    "color_of_shape": "what color is the {shape}?",
    "shape_of_color": "what shape is the {color} object?",
    "digit_of_shape": "what digit is on the {shape}?",
    "digit_of_both": "what digit is on the {color} {shape}?",
    "shape_of_digit": "which shape has the digit {digit}?",
    "color_of_digit": "which color has the digit {digit}?",
    "zone_of_shape": "where is the {shape}?",
    "zone_of_both": "where is the {color} {shape}?",
    "shape_in_zone": "which shape is at the {zone}?",
    "count_color": "how many {color} objects are there?",
    "exists": "is there a {color} {shape}?",
}
WEIGHTS = np.array([10, 10, 11, 12, 9, 9, 9, 12, 6, 6, 6]) / 100.0

_GLYPHS = {  # 5 x 7 bitmaps, one hexadecimal row per line of pixels
    "0": "0E 11 13 15 19 11 0E", "1": "04 0C 04 04 04 04 0E", "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E", "4": "02 06 0A 12 1F 02 02", "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E", "7": "1F 01 02 04 08 08 08", "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
}  # fmt: skip
_GLYPH_SHIFT = {"triangle": 2, "heart": -1}  # rows down, to where the shape is widest


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its words, and the cell it lies in."""

    color: str
    shape: str
    digit: str
    zone: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What is in one picture of `height` x `width` px."""

    height: int
    width: int
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question of one of the kinds in TEMPLATES and its one-word answer."""

    kind: str
    text: str
    answer: str


def vocabulary() -> list[str]:
    """Every word that questions, answers and patch labels use, in a fixed order."""
    words = [BACKGROUND, *COLORS, *SHAPES, *DIGITS, *ZONES, "yes", "no", "?"]
    for template in TEMPLATES.values():
        words += [word for word in template.replace("?", "").split() if not word.startswith("{")]
    return list(dict.fromkeys(words))


def random_scene(rng: Generator, height: int, width: int, fewest: int = 4, most: int = 6) -> Scene:
    """Objects in distinct cells; colours and shapes repeat more often than by chance, to make questions hard."""
    rows, columns = height // CELL, width // CELL
    cells = rng.permutation(rows * columns)[: rng.integers(fewest, most + 1)]
    colors, shapes = list(COLORS), SHAPES
    things: list[Thing] = []
    for cell in cells:
        row, column = divmod(int(cell), columns)
        color, shape = colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]
        if things and rng.random() < 0.25:
            color = things[rng.integers(len(things))].color
        elif things and rng.random() < 0.2:
            shape = things[rng.integers(len(things))].shape
        zone = ZONES[3 * (3 * (2 * row + 1) // (2 * rows)) + 3 * (2 * column + 1) // (2 * columns)]
        things.append(Thing(color, shape, DIGITS[rng.integers(10)], zone, row, column))
    return Scene(height, width, tuple(things))


@cache
def _shape_alpha(shape: str) -> NDArray[np.float32]:
    """Coverage of each pixel by the shape, f32[SPRITE, SPRITE, 1], drawn eight times larger and averaged."""
    big = SPRITE * 8
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((2, 2, big - 3, big - 3), fill=255)
    elif shape == "heart":
        draw.ellipse((0, 4, big * 0.54, big * 0.56), fill=255)
        draw.ellipse((big * 0.46, 4, big - 1, big * 0.56), fill=255)
        draw.polygon([(big * 0.04, big * 0.42), (big * 0.96, big * 0.42), (big * 0.5, big - 1)], fill=255)
    else:
        outlines = {
            "square": [(6, 6), (94, 6), (94, 94), (6, 94)],
            "triangle": [(50, 0), (100, 98), (0, 98)],
            "diamond": [(50, 0), (100, 50), (50, 100), (0, 50)],
            "cross": [(28, 0), (72, 0), (72, 28), (100, 28), (100, 72), (72, 72), (72, 100), (28, 100), (28, 72),
                      (0, 72), (0, 28), (28, 28)],
            "star": [(50, 0), (64, 34), (100, 38), (73, 62), (82, 98), (50, 79), (18, 98), (27, 62), (0, 38), (36, 34)],
            "arrow": [(0, 24), (48, 24), (48, 0), (100, 50), (48, 100), (48, 76), (0, 76)],
        }  # fmt: skip
        draw.polygon([(x * big / 100, y * big / 100) for x, y in outlines[shape]], fill=255)
    pixels = np.asarray(image, dtype=np.float32).reshape(SPRITE, 8, SPRITE, 8).mean((1, 3)) / 255
    return pixels[:, :, None]


@cache
def _glyph(digit: str) -> NDArray[np.bool_]:
    """The digit's ink, bool[7, 5]."""
    rows = [int(row, 16) for row in _GLYPHS[digit].split()]
    return np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], dtype=bool)


def render(scene: Scene, rng: Generator) -> NDArray[np.uint8]:
    """The picture, u8[height, width, 3], with speckles, and brightness, places and colours jittered."""
    x = np.linspace(-1, 1, scene.width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, scene.height, dtype=np.float32)[:, None]
    pixels = np.full((scene.height, scene.width, 3), 112 + 12 * rng.standard_normal(), dtype=np.float32)
    pixels[:, :, 0] += 28 * x
    pixels[:, :, 2] += 28 * y
    for thing in scene.things:
        top, left = (CELL * thing.row + 1 + rng.integers(-1, 2), CELL * thing.column + 1 + rng.integers(-1, 2))
        color = np.array(COLORS[thing.color], dtype=np.float32)
        ink = 10.0 if color @ np.array([0.3, 0.59, 0.11]) > 125 else 250.0
        alpha = _shape_alpha(thing.shape)
        patch = pixels[top : top + SPRITE, left : left + SPRITE]
        patch += alpha * (color + 8 * rng.standard_normal(3) - patch)
        glyph_top = 3 + _GLYPH_SHIFT.get(thing.shape, 0)
        patch[glyph_top : glyph_top + 7, 4:9][_glyph(thing.digit)] = ink
    pixels *= rng.uniform(0.88, 1.1)
    speckled = rng.integers(0, pixels.shape[:2], (scene.height * scene.width // 12, 2))
    pixels[speckled[:, 0], speckled[:, 1]] += 25 * rng.standard_normal((len(speckled), 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def ask(scene: Scene, rng: Generator, weights: NDArray[np.float64] = WEIGHTS) -> Question:
    """One question with exactly one right answer in this scene; `weights` are the shares of the kinds."""
    kinds = list(TEMPLATES)
    while True:
        kind = kinds[rng.choice(len(kinds), p=weights)]
        for _ in range(6):  # another object of the same kind first, so that rejections do not shift the weights
            question = _try_kind(scene, kind, rng)
            if question is not None:
                return question


def _try_kind(scene: Scene, kind: str, rng: Generator) -> Question | None:
    """A question of this kind about a random object, or None where that would be ambiguous."""
    things = scene.things
    thing = things[rng.integers(len(things))]
    text = TEMPLATES[kind]
    if kind == "count_color":
        names = [t.color for t in things]
        color = names[rng.integers(len(names))]  # a colour is drawn as often as it occurs: large counts are not rare
        return Question(kind, text.format(color=color), str(names.count(color)))
    if kind == "exists":
        pairs = {(t.color, t.shape) for t in things}
        color, shape = thing.color, thing.shape
        if rng.random() < 0.5:  # a "no": one word right, and where possible the other one taken from another object
            other = things[rng.integers(len(things))]
            color, shape = (color, other.shape) if rng.random() < 0.7 else (list(COLORS)[rng.integers(8)], shape)
            if (color, shape) in pairs:
                return None
        elif rng.random() < 0.5:  # offsets the "no" questions that the line above gave up
            return None
        return Question(kind, text.format(color=color, shape=shape), "yes" if (color, shape) in pairs else "no")
    answer_field, _, key = kind.replace("_in_", "_of_").partition("_of_")
    keys = ("color", "shape") if key == "both" else (key,)
    same = [t for t in things if all(getattr(t, k) == getattr(thing, k) for k in keys)]
    if len(same) != 1:
        return None
    return Question(kind, text.format(**{k: getattr(thing, k) for k in keys}), getattr(thing, answer_field))


def token_words(scene: Scene) -> list[tuple[str, str, str, str] | None]:
    """(colour, shape, digit, zone) under each visual token in raster order, None where there is background."""
    columns = scene.width // TOKEN
    words: list[tuple[str, str, str, str] | None] = [None] * (columns * (scene.height // TOKEN))
    for thing in scene.things:
        for row in (2 * thing.row, 2 * thing.row + 1):
            for column in (2 * thing.column, 2 * thing.column + 1):
                words[row * columns + column] = (thing.color, thing.shape, thing.digit, thing.zone)
    return words


def sample(family: str, seed: int, index: int) -> tuple[NDArray[np.uint8], Question]:
    """Picture and question number `index` of the data set named by (family, seed)."""
    rng = np.random.default_rng([seed, index])
    sizes = SIZES[family]
    scene = random_scene(rng, *sizes[rng.integers(len(sizes))])
    return render(scene, rng), ask(scene, rng)


def sample_objects(family: str, seed: int, index: int) -> NDArray[np.bool_]:
    """Which visual tokens of that sample's picture lie on an object: bool[N] in raster order."""
    rng = np.random.default_rng([seed, index])
    sizes = SIZES[family]
    scene = random_scene(rng, *sizes[rng.integers(len(sizes))])
    return np.array([words is not None for words in token_words(scene)])


def samples(family: str, seed: int, count: int) -> Iterator[tuple[NDArray[np.uint8], Question]]:
    """The first `count` samples of a data set."""
    return (sample(family, seed, index) for index in range(count))


def write_folder(family: str, seed: int, count: int, out: Path) -> None:
    """Writes `data.jsonl` and one PNG per line of it."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, question) in enumerate(samples(family, seed, count)):
        name = f"{index:05d}.png"
        Image.fromarray(pixels).save(out / name, optimize=True)
        lines.append(json.dumps({"image": name, "question": question.text, "answer": question.answer}))
    (out / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: writes a data folder."""
    parser = argparse.ArgumentParser(description=write_folder.__doc__)
    parser.add_argument("--family", choices=sorted(SIZES), required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_folder(options.family, options.seed, options.count, options.out)


if __name__ == "__main__":
    main()
