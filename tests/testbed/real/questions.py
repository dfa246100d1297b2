"""Questions for the real model: rendered scenes with several objects, and easy-VQA; data folders of both.

    python tests/testbed/real/questions.py --work build/real --count 1000 --seed 7 --out build/real/unseen

Everything is determined by (seed, index). Every fifth sample is one of easy-VQA's "what" questions, from its test split
if the split says so; the others are scenes of tests/testbed/scenes.py, asked with the shares WEIGHTS.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scenes

SIDE = 96  # pixels of a scene: 6 x 6 cells of 2 x 2 visual tokens
THINGS = (3, 5)  # fewest and most objects of a scene
EASY_SHARE = 0.2
EASY_KIND = "easy_vqa"
# Shares of the kinds in the order of scenes.TEMPLATES, for questions that a model is judged by.
WEIGHTS = np.array([27, 27, 0, 0, 0, 0, 22, 6, 18, 0, 0]) / 100.0


@dataclass(frozen=True)
class Sample:
    """A picture, u8[H, W, 3], a question about it, and what is where (None for easy-VQA)."""

    pixels: NDArray[np.uint8]
    question: scenes.Question
    scene: scenes.Scene | None


@cache
def easy_questions(parts: Path, split: str) -> dict[int, list[scenes.Question]]:
    """Picture number -> the "what" questions of easy-VQA about it; split is "train" or "test"."""
    found: dict[int, list[scenes.Question]] = {}
    file = parts / "easy_vqa" / "data" / split / "questions.json"
    for text, answer, picture in json.loads(file.read_text(encoding="utf-8")):
        if text.startswith("what "):
            found.setdefault(picture, []).append(scenes.Question(EASY_KIND, text, answer))
    return found


def easy_picture(parts: Path, split: str, number: int) -> NDArray[np.uint8]:
    """u8[64, 64, 3]."""
    with Image.open(parts / "easy_vqa" / "data" / split / "images" / f"{number}.png") as image:
        return np.asarray(image.convert("RGB"))


def easy_sample(parts: Path, split: str, rng: Generator) -> Sample:
    """A random question of easy-VQA."""
    found = easy_questions(parts, split)
    number = list(found)[rng.integers(len(found))]
    asked = found[number]
    return Sample(easy_picture(parts, split, number), asked[rng.integers(len(asked))], None)


def askable_scene(rng: Generator, fewest: int, most: int) -> scenes.Scene:
    """A scene in which an object is alone with its shape, so that there is something to ask about."""
    while True:
        scene = scenes.random_scene(rng, SIDE, SIDE, fewest, most)
        shapes = [thing.shape for thing in scene.things]
        if any(shapes.count(shape) == 1 for shape in shapes):
            return scene


def sample(parts: Path, split: str, seed: int, index: int) -> Sample:
    """Sample number `index` of the data set named by (split, seed)."""
    rng = np.random.default_rng([seed, index])
    if index % round(1 / EASY_SHARE) == 0:
        return easy_sample(parts, split, rng)
    scene = askable_scene(rng, *THINGS)
    return Sample(scenes.render(scene, rng), scenes.ask(scene, rng, WEIGHTS), scene)


def samples(parts: Path, split: str, seed: int, count: int) -> Iterator[Sample]:
    """The first `count` samples of a data set."""
    return (sample(parts, split, seed, index) for index in range(count))


def write_folder(parts: Path, split: str, seed: int, count: int, out: Path) -> None:
    """Writes `data.jsonl` and one PNG per line of it (docs/data.md)."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, each in enumerate(samples(parts, split, seed, count)):
        name = f"{index:05d}.png"
        Image.fromarray(each.pixels).save(out / name, optimize=True)
        lines.append(json.dumps({"image": name, "question": each.question.text, "answer": each.question.answer}))
    (out / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: writes a data folder."""
    parser = argparse.ArgumentParser(description=write_folder.__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="where assembly.py unpacked the packages")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="of easy-VQA")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_folder(options.work / "parts", options.split, options.seed, options.count, options.out)


if __name__ == "__main__":
    main()
