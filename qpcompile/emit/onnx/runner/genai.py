"""Ask a folder that was exported for onnxruntime-genai: genai runs the graphs, this prepares prompts and pictures.

    python genai_runner.py --image photo.png --question "what is in the picture?"
    python genai_runner.py FOLDER inputs.npz --max-new-tokens 32      token ids in, token ids out

The file needs the folder's `runner.py` beside it, onnxruntime-genai, numpy, pillow and tokenizers. genai's own image
processors do not compute what the models' do, so pictures are prepared here, as in `runner.py`, and set as inputs of
the first graphs. One prompt at a time; every prompt has a generator of its own. In Python:
`GenaiRunner(folder).answer("photo.png", "what is in the picture?")`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.answer import as_pictures
from qpcompile.emit.onnx.runner.chat import Chat, Turn
from qpcompile.emit.onnx.runner.choice import MOST_NEW, Choice, whole
from qpcompile.emit.onnx.runner.folder import (
    CHAT,
    NEW_FOLDER,
    WEIGHTS,
    RunnerError,
    check_folder,
    check_graph,
    read_json,
)
from qpcompile.emit.onnx.runner.inputs import GRID, IDS, MASK, PIXELS, check_grids, check_inputs, read_arrays
from qpcompile.emit.onnx.runner.layout import patch_layout, picture_positions, text_positions
from qpcompile.emit.onnx.runner.runner import MOST_ZEROS, PATCHES

Array = np.ndarray[Any, Any]

CONFIG, OWN = "genai_config.json", "genai_"
VISION_STAGE, PROMPT_STAGE = "vision", "prompt"
# Positions of several axes go in under this name; inputs of a tower that genai_vision.onnx renames, with a prefix.
PROMPT_POSITIONS, OF_TOWER = "prompt_positions", "tower."
# Products with 4-bit weights stay float products: onnxruntime would quantize activations to 8 bits. A plan of memory is
# made for each size that was seen, and sizes vary: it would only be held.
SESSION: Mapping[str, Any] = {
    "session.qdq_matmulnbits_accuracy_level": "0",
    "enable_mem_pattern": False,
    "log_severity_level": 4,
}
# Keys of objects in a configuration. None of them names code, a provider or a file outside the folder.
# fmt: off
_KEYS = frozenset(
    (
        "model", "search", "type", "vocab_size", "context_length", "bos_token_id", "eos_token_id", "pad_token_id",
        "decoder", "session_options", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size",
        "num_hidden_layers", "inputs", "outputs", "pipeline", "input_ids", "attention_mask", "position_ids", "logits",
        "past_key_names", "past_value_names", "present_key_names", "present_value_names", "do_sample", "temperature",
        "top_k", "top_p", "repetition_penalty", "min_length", "max_length", "num_beams", "batch_size",
        "past_present_share_buffer", *SESSION,
    )
)
# fmt: on
# Numbers that genai takes room by, with the most of each.
_MOST_OF_DECODER = {
    "hidden_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_size": 2**16,
    "num_hidden_layers": 2**12,
}
_MOST_OF_SEARCH = {"num_beams": 1, "batch_size": 1}
_STAGE = {"filename", "inputs", "outputs", "run_on_prompt", "run_on_token_gen", "output_names_forwarder"}


class GenaiRunner:
    """A folder exported with `--for genai`, run by onnxruntime-genai. Whatever fails raises RunnerError."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """threads: how many the CPU kernels may use; all cores when None."""
        self.folder = Path(folder)
        self.config, self.generation, files = check_folder(self.folder)
        self.genai = package()
        if CONFIG not in files:
            raise RunnerError(f"the folder has no {CONFIG}", str(self.folder), "export it with --for genai")
        settings = read_json(self.folder / CONFIG)
        stages = self._stages(settings, files)
        self.vocabulary = whole(settings["model"].get("vocab_size"), "vocab_size", 1, 2**31, CONFIG)
        self.longest = whole(settings["model"].get("context_length"), "context_length", 1, 2**31, CONFIG)
        self._check_numbers(settings)
        where = str(self.folder / "config.json")
        self.image_token = whole(self.config.get("image_token_id"), "image_token_id", 0, self.vocabulary - 1, where)
        video = self.config.get("video_token_id")
        self.video_token = None if video is None else whole(video, "video_token_id", 0, 2**31, where)
        self.tower = tuple(stages[VISION_STAGE]["inputs"])
        self.axes = PROMPT_POSITIONS in stages[PROMPT_STAGE]["inputs"]
        self.packed = PATCHES in self.tower
        self.chat = Chat(self.folder, self.image_token) if CHAT in files else None
        try:
            opened = self.genai.Config(str(self.folder))
            if threads is not None:
                own = {"session_options": {"intra_op_num_threads": whole(threads, "threads", 1, 2**12, "threads")}}
                opened.overlay(json.dumps({"model": {"decoder": own}}))
            self.model = self.genai.Model(opened)
        except Exception as error:
            raise self._failed("onnxruntime-genai refuses the folder", error) from error

    def answer(self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]] = (), **options: Any) -> str:
        """The whole answer, without white space around it; arguments as of `stream`."""
        return "".join(self.stream(picture, question, history, **options)).strip()

    def stream(
        self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]] = (), **options: Any
    ) -> Iterator[str]:
        """The answer in parts, as they come.

        picture: a path or a Pillow image, a list of those, or None. history: the turns before, (picture, question,
        answer) each. options: `max_new_tokens`, and search options of genai (do_sample, temperature, top_k, top_p,
        random_seed, ...).
        """
        if self.chat is None:
            raise RunnerError(
                f"the folder has no {CHAT}: it takes token ids and gives token ids",
                str(self.folder),
                "give `tokens` a processor's arrays; README.md says why",
            )
        turns = [Turn(as_pictures(seen), said, reply) for seen, said, reply in history]
        given: dict[str, Any] = {**self.chat.inputs([[*turns, Turn(as_pictures(picture), question)]])}
        yield from self.chat.stream(self.tokens(given.pop(IDS), **options, **given))

    def tokens(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        **search: Any,
    ) -> Iterator[int]:
        """The tokens of one answer as they come, without the one that ends it.

        Args:
            input_ids: i64[1, S] or i64[S], the prompt with its image tokens.
            max_new_tokens: how long the answer may be; None takes the folder's setting, or 32 where it has none.
            attention_mask: i64[1, S], which leaves nothing out.
            pixel_values, image_grid_thw: the pictures, as the model's processor returns them.
            search: search options of genai, in place of the folder's.
        """
        try:
            inputs = {MASK: attention_mask, PIXELS: pixel_values, GRID: image_grid_thw}
            yield from self._tokens(input_ids, max_new_tokens, inputs, search)
        except RunnerError:
            raise
        except Exception as error:
            raise self._failed("onnxruntime-genai does not run this prompt", error) from error

    def _tokens(
        self, input_ids: Any, max_new_tokens: int | None, arrays: Mapping[str, Any], search: Mapping[str, Any]
    ) -> Iterator[int]:
        given = check_inputs(
            {IDS: np.atleast_2d(np.asarray(input_ids)), **arrays}, self.image_token, self.video_token, self.vocabulary
        )
        ids = given[IDS]
        if len(ids) != 1 or ids.shape[1] < 2 or not given[MASK].all():
            what = f"the prompt is {list(ids.shape)} tokens, {int((given[MASK] == 0).sum())} of them padding"
            raise RunnerError(what, IDS, "give one prompt of two tokens or more, without padding")
        choice = Choice.read(self.generation, self.vocabulary, str(self.folder / "generation_config.json"))
        length = whole(choice.new if max_new_tokens is None else max_new_tokens, "max_new_tokens", 1, MOST_NEW, "")
        if ids.shape[1] + length > self.longest:
            what = f"{ids.shape[1]} tokens of the prompt and {length} new ones are more than {self.longest}"
            raise RunnerError(what, IDS, "ask for fewer new tokens, or shorten the prompt")
        if beside := set(search) & {"num_beams", "batch_size", "max_length", "num_return_sequences"}:
            raise RunnerError(f"{', '.join(sorted(beside))} cannot be set", "search", "one prompt gets one answer")
        # genai keeps no copy of an input.
        feeds = {name: np.ascontiguousarray(value) for name, value in self._feeds(given).items()}
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=ids.shape[1] + length, **search)
        generator = self.genai.Generator(self.model, params)
        for name, value in feeds.items():
            generator.set_model_input(name, value)
        generator.append_tokens(ids[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in choice.ends:
                return
            yield token

    def _feeds(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """What the graphs take beside the prompt: the tower's inputs, and positions of several axes."""
        visual, mask = given[IDS] == self.image_token, given[MASK]
        merge = self._merge()
        grids = np.asarray(given.get(GRID, np.empty((0, 3), np.int64)), np.int64)
        if self.packed and (GRID in given or PIXELS in given):
            check_grids(grids, len(given.get(PIXELS, ())), merge, visual)
        feeds: dict[str, Array] = {}
        if self.axes:
            text = text_positions(mask)
            axes = picture_positions(visual, mask, grids, merge) if len(grids) else np.stack([text] * 3)
            feeds[PROMPT_POSITIONS] = np.concatenate([text[None], axes])
        pixels = given.get(PIXELS)
        if pixels is None:
            pixels, grids = self._unseen()
        tower: dict[str, Array] = {PIXELS: pixels, PATCHES: pixels}
        if self.packed:
            tower |= patch_layout(grids, self.config["vision_config"])
        feeds |= {name: tower[name.removeprefix(OF_TOWER)] for name in self.tower}
        return {
            name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64) for name, value in feeds.items()
        }

    def _unseen(self) -> tuple[Array, Array]:
        """Pixels and size of a picture that no token stands for: genai runs the tower for every prompt."""
        channels = self._number("num_channels", 0) or self._number("in_channels", 0) or self._number("in_chans", 3)
        merge = self._merge()
        size = self.config["vision_config"].get("image_size")
        if self.packed:
            width = channels * self._number("temporal_patch_size", 1) * self._number("patch_size", 14) ** 2
            return _zeros(merge**2, width), np.array([[1, merge, merge]])
        sides = size if isinstance(size, list) else [size, size]
        height, width = (whole(side, "image_size", 1, 2**12, "config.json") for side in sides)
        return _zeros(1, channels, height, width), np.array([[1, 1, 1]])

    def _merge(self) -> int:
        merge = self.config["vision_config"].get("spatial_merge_size", 1)
        return whole(merge, "vision_config.spatial_merge_size", 1, 64, "config.json")

    def _number(self, name: str, default: int) -> int:
        value = self.config["vision_config"].get(name)
        return default if value is None else whole(value, f"vision_config.{name}", 0, 2**12, "config.json")

    def _stages(self, settings: Mapping[str, Any], files: frozenset[str]) -> dict[str, Any]:
        """The graphs by name, after everything in the configuration was found to be what an export writes."""
        where = str(self.folder / CONFIG)
        try:
            decoder = settings["model"]["decoder"]
            (stages,) = decoder["pipeline"]
            unknown = _keys({**settings, "model": {**settings["model"], "decoder": {**decoder, "pipeline": []}}})
            unknown = (unknown - _KEYS) | {key for stage in stages.values() for key in set(stage) - _STAGE}
            graphs = {stage["filename"] for stage in stages.values()}
            sound = decoder["session_options"] == SESSION and {VISION_STAGE, PROMPT_STAGE} <= set(stages)
            listed = [stage[names] for stage in stages.values() for names in ("inputs", "outputs")]
            lists = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in listed)
            kind = settings["model"]["type"], settings["search"]["past_present_share_buffer"]
            # genai reads the file too, in its own way: only what an export writes to the letter is the same to both.
            written = (json.dumps(settings, indent=2) + "\n").encode() == (self.folder / CONFIG).read_bytes()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise RunnerError(f"{CONFIG} is not one that an export writes: {error!r}", where, NEW_FOLDER) from error
        sound = sound and lists and written and kind == ("decoder-pipeline", False)
        if unknown or not sound or not graphs <= files:
            said = ", ".join(sorted(map(str, unknown | (graphs - files))))[:200] or "its options are other ones"
            raise RunnerError(f"{CONFIG} is not one that an export writes: {said}", where, NEW_FOLDER)
        for name in sorted(graphs):
            check_graph(self.folder / name, (self.folder / WEIGHTS).stat().st_size)
        return stages

    def _check_numbers(self, settings: Mapping[str, Any]) -> None:
        """Numbers that genai computes addresses from, which no graph bounds."""
        model = settings["model"]
        for part, limits in ((model["decoder"], _MOST_OF_DECODER), (settings["search"], _MOST_OF_SEARCH)):
            for name, most in limits.items():
                whole(part.get(name), name, 1, most, CONFIG)
        ends = model.get("eos_token_id")
        for token in [*(ends if isinstance(ends, list) else [ends]), model.get("pad_token_id")]:
            whole(token, "eos_token_id, pad_token_id", 0, self.vocabulary - 1, CONFIG)

    def _failed(self, what: str, error: Exception) -> RunnerError:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return RunnerError(f"{what}: {type(error).__name__}: {first}", str(self.folder), NEW_FOLDER)


def _zeros(*sizes: int) -> Array:
    if math.prod(sizes) > MOST_ZEROS:
        raise RunnerError(f"config.json has pictures of the shape {sizes}", "vision_config", NEW_FOLDER)
    return np.zeros(sizes, np.float32)


def package() -> Any:
    """The module onnxruntime_genai, whose telemetry is switched off unless the environment asks for it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise RunnerError(
            "the package onnxruntime-genai is not installed", "GenaiRunner", "run: pip install onnxruntime-genai"
        ) from error
    return onnxruntime_genai


def _keys(value: Any) -> set[str]:
    """The keys of all objects in a value."""
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


def main() -> None:
    """Print the answer as it comes, or the new tokens of an .npz file as a JSON list."""
    parser = argparse.ArgumentParser(description="Ask an exported model about pictures, with onnxruntime-genai.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="exported folder; its own")
    parser.add_argument("inputs", type=Path, nargs="?", help=".npz of a processor's arrays, instead of a question")
    parser.add_argument("--image", "-i", action="append", default=[], help="picture; repeatable")
    parser.add_argument("--question", "-q")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer; the folder's own setting")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if (options.inputs is None) == (options.question is None):
        parser.error("give a question, or an .npz file")
    try:
        runner = GenaiRunner(options.folder, options.threads)
        if options.inputs is not None:
            inputs: dict[str, Any] = {**read_arrays(options.inputs)}
            if beside := set(inputs) - {IDS, MASK, PIXELS, GRID}:
                raise RunnerError(f"the file holds {', '.join(sorted(beside))}", str(options.inputs), "leave them out")
            ids = inputs.pop(IDS, np.empty((0, 0)))
            print(json.dumps(list(runner.tokens(ids, max_new_tokens=options.max_new_tokens, **inputs))))
            return
        for part in runner.stream(list(options.image), options.question, max_new_tokens=options.max_new_tokens):
            print(part, end="", flush=True)
        print()
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
