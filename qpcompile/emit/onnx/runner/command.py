"""Ask an exported vision-language model about pictures, with onnxruntime, numpy, pillow and tokenizers alone.

    python runner.py --image photo.png --question "what is in the picture?"
    python runner.py --image photo.png                            a chat: one question per line of the input
    python runner.py FOLDER inputs.npz --max-new-tokens 32        token ids in, token ids out

The file stands alone: a copy of it lies in every exported folder, which is the one it opens unless another is named.
`inputs.npz` holds what the model's processor returns as numpy arrays: input_ids, attention_mask, pixel_values and,
where pictures have sizes, image_grid_thw. Whatever else it holds is refused. Settings of generation_config.json count;
without any, answers are greedy. In Python: `Runner(folder).answer("photo.png", "what is in the picture?")`.

Exit codes: 0 done, 1 an error (what, where, what to do), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.answer import Runner
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.inputs import IDS, read_arrays
from qpcompile.emit.onnx.runner.runner import OnnxVLM


def main() -> None:
    """Stream the answer, or print the new tokens of each row of an .npz file as a JSON list."""
    parser = argparse.ArgumentParser(description="Ask an exported vision-language model about pictures.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="exported folder; its own")
    parser.add_argument("inputs", type=Path, nargs="?", help=".npz of a processor's arrays, instead of a question")
    parser.add_argument("--image", "-i", action="append", default=[], help="picture; repeatable")
    parser.add_argument("--question", "-q", help="without it, every line of the input is one")
    parser.add_argument("--max-new-tokens", type=_count, default=None, help="longest answer; the folder's own setting")
    parser.add_argument("--temperature", type=float, default=None, help="ask for sampling; 0: the most probable token")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0, help="where sampling begins")
    parser.add_argument("--threads", type=_count, default=None)
    options = parser.parse_args()
    if options.inputs is not None and (options.image or options.question):
        parser.error("give an .npz file, or pictures and questions")
    try:
        if options.inputs is not None:
            _token_ids(options)
        else:
            _talk(Runner(options.folder, options.threads), options)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None


def _token_ids(options: argparse.Namespace) -> None:
    inputs: dict[str, Any] = {**read_arrays(options.inputs)}
    if options_inside := inputs.keys() & {"max_new_tokens", "seed", "settings"}:
        what = f"the file holds {', '.join(sorted(options_inside))}, which are no inputs of a model"
        raise RunnerError(what, str(options.inputs), "leave them out; give them as options")
    model = OnnxVLM(options.folder, options.threads)
    ids = inputs.pop(IDS, np.empty((0, 0)))
    answers = model.generate(ids, options.max_new_tokens, abs(options.seed), **inputs)
    for row in answers[:, ids.shape[1] :].tolist():
        print(json.dumps(row))


def _talk(runner: Runner, options: argparse.Namespace) -> None:
    """Answer the question, or those that are typed: the pictures belong to the first."""
    settings = {name: getattr(options, name) for name in ("max_new_tokens", "seed", "temperature", "top_k", "top_p")}
    history: list[tuple[Any, str, str]] = []
    for question in [options.question] if options.question is not None else _typed():
        picture = None if history else list(options.image)
        parts: list[str] = []
        for part in runner.stream(picture, question, history, **settings):
            parts.append(part.lstrip() if not "".join(parts).strip() else part)
            print(parts[-1], end="", flush=True)
        print()
        history.append((picture, question, "".join(parts).strip()))


def _typed() -> Iterator[str]:
    """The lines of the input that say something."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return number


if __name__ == "__main__":
    main()
