"""Full-precision accuracy of the real model by kind of question, and its blind score.

    python tests/testbed/real/evaluate_real.py build/real/model --work build/real --count 500 --seed 7

As tests/testbed/evaluate.py: the folder's own processor and `model.generate`, greedy, exact match of the text.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from questions import samples
from transformers import AutoModelForImageTextToText, AutoProcessor

# isort: split
from evaluate import VIEWS, answer  # type: ignore[attr-defined]  # the folder above: `questions` puts it on the path


def main() -> None:
    """Command line: prints one JSON object."""
    parser = argparse.ArgumentParser(description="Accuracy and blind score of the real model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--views", nargs="+", choices=sorted(VIEWS), default=["picture", "grey"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(options.folder).eval()
    processor = AutoProcessor.from_pretrained(options.folder)
    data = list(samples(options.work / "parts", "test", options.seed, options.count))
    report: dict[str, object] = {"count": options.count, "seed": options.seed}
    for view in options.views:
        right, asked = Counter[str](), Counter[str]()
        for first in range(0, options.count, 20):
            part = data[first : first + 20]
            pictures = [VIEWS[view](each.pixels) for each in part]
            answers = answer(model, processor, pictures, [each.question.text for each in part])
            for each, given in zip(part, answers, strict=True):
                asked[each.question.kind] += 1
                right[each.question.kind] += given == each.question.answer
        report[view] = round(right.total() / options.count, 4)
        report[f"{view}_by_kind"] = {kind: f"{right[kind]}/{asked[kind]}" for kind in asked}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
