"""Run an exported vision-language model with onnxruntime and numpy alone: greedy answers, several prompts at a time.

    python runner.py FOLDER inputs.npz --max-new-tokens 32

The file stands alone: a copy of it lies in every exported folder. `inputs.npz` holds what the model's processor
returns as numpy arrays: input_ids, attention_mask, pixel_values and, where pictures have sizes, image_grid_thw.
What depends on those sizes (segments, windows and rotary positions of patches, three-axis positions of tokens) is
computed here, as the models define it: "Qwen2-VL", section 2.1 (arXiv 2409.12191), and "Qwen2.5-VL", section 2.1
(arXiv 2502.13923).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array = np.ndarray[Any, Any]

IDS, MASK, POSITIONS, FEATURES, LOGITS = "input_ids", "attention_mask", "position_ids", "image_features", "logits"
VISUAL, VALID, COUNT, SEEN = "visual_mask", "valid_mask", "visual_count", "tokens_seen"
# What the vision graph says of each visual token besides its features, where a pruning method reads it.
VISUAL_SCORES, VISUAL_KEYS = "visual_scores", "visual_keys"
OF_PICTURES = (FEATURES, VISUAL_SCORES, VISUAL_KEYS)
# Inputs this runner can compute; caches and the state of token cuts come on top.
PATCH_INPUTS = ("grid_thw", "cu_seqlens", "position_ids", "window_index", "cu_window_seqlens")
VISION_INPUTS = ("pixel_values", "hidden_states", *PATCH_INPUTS)
LANGUAGE_INPUTS = (IDS, *OF_PICTURES, MASK, POSITIONS, VISUAL, VALID, COUNT, SEEN)
STATE = ("past_key_values", "kept", "alive")

# Metadata of a decode graph that appends to its caches in place, where `Steps` gives them room: this many tokens more,
# or a quarter of what they hold.
IN_PLACE = "caches_in_place"
ROOM = 64

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class OnnxVLM:
    """An exported folder, ready to generate."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """threads: how many the CPU kernels may use; all cores when None."""
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self.generation = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # A plan of memory is made for each size that was seen, and sizes vary: it would only be held.
        options.enable_mem_pattern = False
        # Products with 4-bit weights stay float products: onnxruntime would quantize activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        self.vision, self.prefill, self.decode = (
            ort.InferenceSession(self.folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("vision", "prefill", "decode")
        )
        self.image_token = int(self.config["image_token_id"])
        self.in_place = IN_PLACE in self.decode.get_modelmeta().custom_metadata_map

    def generate(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        pixel_values: Array | None = None,
        image_grid_thw: Array | None = None,
        max_new_tokens: int = 32,
    ) -> Array:
        """The most likely continuation, token by token.

        Args:
            input_ids: i64[B, S], shorter prompts padded on the left.
            attention_mask: i64[B, S], 0 on padding.
            pixel_values: the pictures of all rows in reading order.
            image_grid_thw: i64[pictures, 3], frames, rows and columns of patches; for models with picture sizes.

        Returns: i64[B, S + T], prompt and answer; rows that ended early are filled up with the padding token.
        """
        ids = np.asarray(input_ids, np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
        pictures = self.encode(pixel_values, image_grid_thw)
        rows = 0 if pictures is None else len(pictures[FEATURES])
        if rows != (found := int((ids == self.image_token).sum())):
            raise ValueError(f"the prompt has {found} image tokens (id {self.image_token}), the pictures give {rows}")
        steps = Steps(self, mask, self._positions(ids, mask, image_grid_thw))
        logits = steps.prefill(ids, pictures)
        ends, pad = self._special_tokens()
        open_rows = np.ones(len(ids), bool)
        for step in range(max_new_tokens):
            token = np.where(open_rows, logits.argmax(-1), pad)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            open_rows &= ~np.isin(token, ends)
            if not open_rows.any() or step + 1 == max_new_tokens:
                break
            logits = steps.decode(token[:, None])
        return ids

    def encode(self, pixel_values: Array | None, image_grid_thw: Array | None = None) -> dict[str, Array] | None:
        """The visual tokens of all pictures in order, `image_features: f[N, C]`, and what else is said of each."""
        if pixel_values is None:
            return None
        if image_grid_thw is None:
            results = run(self.vision, {"pixel_values": pixel_values}, options=_once())
            return {name: value.numpy() for name, value in results.items()}
        # Patches of different pictures do not see each other, so time and memory grow with the largest picture alone.
        grids = np.asarray(image_grid_thw, np.int64)
        parts: list[dict[str, ort.OrtValue]] = []
        for grid, patches in zip(grids, np.split(pixel_values, np.cumsum(grids.prod(1))[:-1]), strict=True):
            feeds = {"pixel_values": patches, "hidden_states": patches}
            feeds |= patch_layout(grid[None], self.config["vision_config"])
            parts.append(run(self.vision, feeds, options=_once()))
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    def _positions(self, ids: Array, mask: Array, grids: Array | None) -> Array:
        rank = next((len(entry.shape) for entry in self.prefill.get_inputs() if entry.name == POSITIONS), 2)
        text = text_positions(mask)
        if rank == 2:
            return text
        axes = np.broadcast_to(text, (3, *text.shape))
        if grids is not None:
            merge = int(self.config["vision_config"]["spatial_merge_size"])
            axes = picture_positions(ids == self.image_token, mask, np.asarray(grids, np.int64), merge)
        return np.concatenate([text[None], axes])

    def _special_tokens(self) -> tuple[list[int], int]:
        """Ids that end an answer, and the id that fills up a row."""
        ends = self.generation.get("eos_token_id")
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = self.generation.get("pad_token_id")
        return ends, int(pad if pad is not None else ends[0] if ends else 0)


class Steps:
    """One prompt's prefill and the decode steps after it: caches, masks and positions between them."""

    def __init__(self, model: OnnxVLM, mask: Array, positions: Array) -> None:
        self.model = model
        self.mask = mask
        self.positions = positions
        self.state: dict[str, ort.OrtValue] = {}
        self.seen = mask.shape[1]
        self.rooms: dict[str, Array] = {}
        self.filled: dict[str, int] = {}
        self.binding: ort.IOBinding | None = None

    def prefill(self, ids: Array, pictures: Mapping[str, Array] | None) -> Array:
        """Logits f[B, V] after the prompt; ids: i64[B, S], pictures: what `encode` returned."""
        visual = ids == self.model.image_token
        if pictures is None:
            # One row that nobody reads: sizes that vary have a name instead of a number.
            entries = [entry for entry in self.model.prefill.get_inputs() if entry.name in OF_PICTURES]
            pictures = {entry.name: np.zeros((1, *entry.shape[1:]), np.float32) for entry in entries}
        feeds: dict[str, Array] = {
            IDS: ids,
            **pictures,
            MASK: self.mask,
            POSITIONS: self.positions,
            VISUAL: visual,
            VALID: self.mask != 0,
            COUNT: np.arange(int(visual.sum(1).min())),
        }
        return self._step(self.model.prefill, feeds, _once())

    def decode(self, token: Array) -> Array:
        """Logits f[B, V] after one more token; token: i64[B, 1]."""
        self.positions = self.positions[..., -1:] + 1
        self.mask = np.concatenate([self.mask, np.ones_like(self.mask[:, :1])], axis=1)
        for name in [name for name in self.state if name.startswith(("kept.", "alive."))]:
            # The new token joins the kept ones of every cut, at its own position.
            value = self.state[name].numpy()
            new = np.full_like(value[:, :1], self.seen if name.startswith("kept.") else True)
            self.state[name] = ort.OrtValue.ortvalue_from_numpy(np.concatenate([value, new], axis=1))
        feeds = {IDS: token, MASK: self.mask, POSITIONS: self.positions, SEEN: np.arange(self.seen)}
        self.seen += 1
        return self._append(feeds) if self.model.in_place else self._step(self.model.decode, feeds)

    def _append(self, feeds: Mapping[str, Array]) -> Array:
        """A step of a graph that writes the new token into the room behind each of its caches."""
        session = self.model.decode
        if self.binding is None or not self._has_room():
            self.binding = self._bound_caches(session)
        for entry in session.get_inputs():
            if not entry.name.startswith("past_key_values."):
                self.binding.bind_ortvalue_input(entry.name, given(entry, feeds, self.state))
        session.run_with_iobinding(self.binding)
        for path in self.rooms:
            self.filled[path] += 1
        # The next step writes its logits to the same memory.
        return self.binding.get_outputs()[0].numpy().copy()

    def _has_room(self) -> bool:
        return all(self.filled[path] < room.shape[2] for path, room in self.rooms.items())

    def _bound_caches(self, session: ort.InferenceSession) -> ort.IOBinding:
        """Where logits and caches go and caches come from; every cache gets new room."""
        binding = session.io_binding()
        binding.bind_output(LOGITS)
        for entry in session.get_inputs():
            path, parts = entry.name, entry.name.split(".")
            if parts[0] != "past_key_values":
                continue
            if parts[-1] != "scale":
                held = self.rooms.get(path)
                held = self.state[path].numpy() if held is None else held[:, :, : self.filled[path]]
                length = self.filled[path] = held.shape[2]
                room = np.zeros((*held.shape[:2], length + max(ROOM, length // 4), held.shape[3]), held.dtype)
                room[:, :, :length] = held
                self.rooms[path], self.state[path] = room, ort.OrtValue.ortvalue_from_numpy(room)
                binding.bind_ortvalue_output(f"present.{'.'.join(parts[1:])}", self.state[path])
            binding.bind_ortvalue_input(path, self.state[path])
        return binding

    def _step(
        self, session: ort.InferenceSession, feeds: Mapping[str, Array], options: ort.RunOptions | None = None
    ) -> Array:
        results = run(session, feeds, self.state, options)
        logits = results.pop(LOGITS).numpy()
        for name, value in results.items():
            path = name.removeprefix("present.")
            self.state[path if path.startswith(("kept.", "alive.")) else f"past_key_values.{path}"] = value
        return logits


def _once() -> ort.RunOptions:
    """For a graph that runs once per prompt or picture: it gives its memory back, another graph comes next."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def run(
    session: ort.InferenceSession,
    feeds: Mapping[str, Array],
    state: Mapping[str, ort.OrtValue] | None = None,
    options: ort.RunOptions | None = None,
) -> dict[str, ort.OrtValue]:
    """Run a graph on those of `feeds` and `state` that it takes; results stay in onnxruntime's memory."""
    values = {entry.name: given(entry, feeds, state or {}) for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, values, options), strict=True))


def given(entry: Any, feeds: Mapping[str, Array], state: Mapping[str, ort.OrtValue]) -> ort.OrtValue:
    """The value of one input of a graph, from `state` or, in the input's type, from `feeds`."""
    if entry.name in state:
        return state[entry.name]
    if entry.name not in feeds:
        raise ValueError(f"the model needs {entry.name}, which was not given")
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feeds[entry.name], dtype=_TYPES[entry.type]))


def text_positions(mask: Array) -> Array:
    """Positions i64[B, S] that count the tokens which are no padding; mask: i64[B, S]."""
    return np.where(mask == 0, 0, np.cumsum(mask, axis=1) - 1)


def picture_positions(visual: Array, mask: Array, grids: Array, merge: int) -> Array:
    """Frame, row and column of every token, i64[3, B, S]: text counts on all three axes, a picture spans its grid.

    Args:
        visual: bool[B, S], the tokens of pictures.
        mask: i64[B, S], 0 on padding.
        grids: i64[pictures, 3], in patches; a token covers merge x merge of them.
    """
    positions = np.zeros((3, *visual.shape), np.int64)
    pictures = iter(grids.tolist())
    for row, (flags, real) in enumerate(zip(visual, mask.astype(bool), strict=True)):
        parts: list[Array] = []
        start = 0
        for is_picture, group in groupby(flags[real].tolist()):
            if is_picture:
                frames, height, width = next(pictures)
                parts.append(np.indices((frames, height // merge, width // merge)).reshape(3, -1) + start)
                start += max(height, width) // merge
            else:
                length = len(list(group))
                parts.append(np.broadcast_to(np.arange(length), (3, length)) + start)
                start += length
        positions[:, row, real] = np.concatenate(parts, axis=1)
    return positions


def patch_layout(grids: Array, config: Mapping[str, Any]) -> dict[str, Array]:
    """What a tower over packed patches needs to know about the pictures; grids: i64[pictures, 3]."""
    merge = int(config.get("spatial_merge_size", 1))
    frames = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
    layout = {
        "grid_thw": grids,
        "cu_seqlens": np.concatenate([[0], np.cumsum(frames)]),
        "position_ids": patch_positions(grids, merge),
    }
    if config.get("window_size") is not None:
        side = int(config["window_size"]) // merge // int(config["patch_size"])
        layout["window_index"], layout["cu_window_seqlens"] = windows(grids, merge, side)
    return layout


def patch_positions(grids: Array, merge: int) -> Array:
    """Row and column of every patch, i64[P, 2]; patches come in blocks of merge x merge, as they are merged later."""
    parts: list[Array] = []
    for frames, height, width in grids.tolist():
        axes = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
        parts.append(np.tile(axes.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (frames, 1)))
    return np.concatenate(parts)


def windows(grids: Array, merge: int, side: int) -> tuple[Array, Array]:
    """Order i64[P / merge^2] that puts the tokens of one window together, and where windows end, in patches.

    Windows are side x side tokens; those at the right and lower border hold fewer.
    """
    order: list[Array] = []
    lengths: list[int] = []
    first = 0
    for frames, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        tokens = np.arange(frames * rows * columns).reshape(frames, rows, columns) + first
        first += tokens.size
        for frame in tokens:
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    window = frame[top : top + side, left : left + side].ravel()
                    order.append(window)
                    lengths.append(window.size * merge * merge)
    return np.concatenate(order), np.concatenate([[0], np.cumsum(lengths)])


def main() -> None:
    """Print the new tokens of each row as a JSON list."""
    parser = argparse.ArgumentParser(description="Generate with an exported vision-language model.")
    parser.add_argument("folder", type=Path, help="folder with vision.onnx, prefill.onnx and decode.onnx")
    parser.add_argument("inputs", type=Path, help=".npz of the processor's arrays")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    known = (IDS, MASK, "pixel_values", "image_grid_thw")
    with np.load(options.inputs, allow_pickle=False) as stored:
        inputs = {name: stored[name] for name in stored.files if name in known}
    model = OnnxVLM(options.folder, options.threads)
    answers = model.generate(**inputs, max_new_tokens=options.max_new_tokens)
    for row in answers[:, inputs[IDS].shape[1] :].tolist():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
