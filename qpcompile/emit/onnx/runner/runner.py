"""Run the graphs of an exported folder with onnxruntime and numpy, several prompts at a time: token ids in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qpcompile.emit.onnx.runner.choice import MOST_NEW, Choice, whole
from qpcompile.emit.onnx.runner.folder import CHAT, GRAPH, NEW_FOLDER, RunnerError, check_folder
from qpcompile.emit.onnx.runner.inputs import (
    GRID,
    IDS,
    MASK,
    PIXELS,
    check_grids,
    check_inputs,
    check_pixels,
)
from qpcompile.emit.onnx.runner.layout import patch_layout, picture_positions, text_positions
from qpcompile.emit.onnx.runner.masks import MASKS, read_masks, tables
from qpcompile.emit.onnx.runner.sizes import SIZES, Size, read_sizes, sized_positions, split_pictures, takes_several

Array = np.ndarray[Any, Any]

POSITIONS, FEATURES, LOGITS = "position_ids", "image_features", "logits"
VISUAL, VALID, COUNT, SEEN = "visual_mask", "valid_mask", "visual_count", "tokens_seen"
# What the vision graph says of each visual token besides its features, where a pruning method reads it.
VISUAL_SCORES, VISUAL_KEYS = "visual_scores", "visual_keys"
OF_PICTURES = (FEATURES, VISUAL_SCORES, VISUAL_KEYS)
# What other inputs of the decoder hold at visual tokens: `rows.<input>`.
ROWS = "rows"
# Inputs this runner can compute; caches and the state of token cuts come on top.
PATCH_INPUTS = ("grid_thw", "cu_seqlens", "position_ids", "window_index", "cu_window_seqlens")
PATCHES = "hidden_states"
VISION_INPUTS = (PIXELS, PATCHES, *PATCH_INPUTS)
LANGUAGE_INPUTS = (IDS, *OF_PICTURES, MASK, POSITIONS, VISUAL, VALID, COUNT, SEEN)
STATE = ("past_key_values", "past_states", "kept", "alive")
# State whose name for the next step is that of the output, without `present`.
AS_NAMED = ("past_states.", "kept.", "alive.")

# Metadata of a decode graph that appends to its caches in place, where `Steps` gives them room: this many tokens more,
# or a quarter of what they hold.
IN_PLACE = "caches_in_place"
ROOM = 64
# Rows at once, and numbers of all inputs that stand for pictures that are not there.
MOST_ROWS, MOST_ZEROS = 2**12, 2**28
# Without enable_fallback=0 a graph that fails is tried twice, with a note among the answers.
ONLY: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class OnnxVLM:
    """An exported folder, ready to generate. Whatever fails raises RunnerError."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """threads: how many the CPU kernels may use; all cores when None."""
        self.folder = Path(folder)
        self.config, self.generation, files = check_folder(self.folder)
        # Whether the folder turns questions into token ids and back.
        self.speaks = CHAT in files
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # A plan of memory is made for each size that was seen, and sizes vary: it would only be held.
        options.enable_mem_pattern = False
        # Products with 4-bit weights stay float products: onnxruntime would quantize activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        names = ["vision.onnx", "prefill.onnx", "decode.onnx"]
        names += sorted(name for name in files if name.endswith(GRAPH) and name not in names)
        try:
            sessions = {name: ort.InferenceSession(self.folder / name, options, **ONLY) for name in names}
        except Exception as error:
            raise _disagrees("onnxruntime refuses a graph", error, self.folder) from error
        self.vision, self.prefill, self.decode = (sessions.pop(name) for name in names[:3])
        # One vision graph for each size of picture, or one for all.
        self.sized = {"vision.onnx": self.vision, **sessions}
        self.masks = read_masks(self.folder / MASKS) if MASKS in files else {}
        self.sizes: list[Size] = []
        self.several = SIZES not in files or takes_several(self.folder / SIZES)
        if SIZES in files:
            self.sizes = read_sizes(self.folder / SIZES, {name: _shapes(each) for name, each in self.sized.items()})
        # Patches of pictures of many sizes come in one row, with the sizes beside them.
        self.packed = PATCHES in {entry.name for entry in self.vision.get_inputs()}
        self.vocabulary = self._vocabulary()
        where = str(self.folder / "config.json")
        self.image_token = whole(self.config.get("image_token_id"), "image_token_id", 0, 2**31, where)
        video = self.config.get("video_token_id")
        self.video_token = None if video is None else whole(video, "video_token_id", 0, 2**31, where)
        self.in_place = IN_PLACE in self.decode.get_modelmeta().custom_metadata_map

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: Any = None,
        seed: Any = 0,
        settings: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> Array:
        """The continuation of each prompt, token by token, as the folder's generation settings ask.

        Args:
            input_ids: i64[B, S], arrays or what numpy makes one of; shorter prompts padded on the left.
            max_new_tokens: how long answers may be; None takes the folder's own setting, or 32 where it has none.
            seed: where chance begins, a number of 0 or more, for settings with `do_sample`.
            settings: generation settings in place of the folder's.
            inputs: the processor's other arrays: attention_mask i64[B, S], 0 on padding; pixel_values, the pictures of
                all rows in reading order; image_grid_thw i64[pictures, 3], frames, rows and columns of patches, for
                models with picture sizes. Any other is refused.

        Returns: i64[B, S + T], prompt and answer; rows that ended early are filled up with the padding token.
        """
        new = [token[:, None] for token in self.stream(input_ids, max_new_tokens, seed, settings, **inputs)]
        return np.concatenate([np.asarray(input_ids, np.int64), *new], axis=1)

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: Any = None,
        seed: Any = 0,
        settings: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> Iterator[Array]:
        """The tokens of `generate` as they come, one of each row: i64[B]."""
        try:
            choice = self.choice(settings)
            length = choice.new if max_new_tokens is None else max_new_tokens
            length = whole(length, "max_new_tokens", 1, MOST_NEW, "max_new_tokens")
            pictures = {name for size in self.sizes for name in (*size.shapes, *size.values)} or (PIXELS, GRID)
            tokens = self.image_token, self.video_token, self.vocabulary
            given = check_inputs({IDS: input_ids, **inputs}, *tokens, pictures)
            whole(len(given[IDS]), "the number of prompts", 1, MOST_ROWS, IDS)
            chance = np.random.default_rng(whole(seed, "seed", 0, 2**64, "seed"))
            yield from self._answer(given, choice, length, chance)
        except RunnerError:
            raise
        except Exception as error:
            raise _disagrees("the folder's graphs do not do what the runner expects", error, self.folder) from error

    def choice(self, settings: Mapping[str, Any] | None = None) -> Choice:
        """How tokens are chosen: the folder's settings, and others in their place."""
        where = str(self.folder / "generation_config.json")
        return Choice.read({**self.generation, **(settings or {})}, self.vocabulary, where)

    def _answer(
        self, given: Mapping[str, Array], choice: Choice, length: int, chance: np.random.Generator
    ) -> Iterator[Array]:
        ids, mask, grids = given[IDS], given[MASK], given.get(GRID)
        prompt, visual = ids.shape[1], ids == self.image_token
        sizes: list[Size] = []
        if self.sizes:
            found = split_pictures(self.sizes, _without(given, IDS, MASK), visual)
            if len(found) > 1 and not self.several:
                raise RunnerError(
                    f"the call has {len(found)} pictures, and this folder was compared on one at a time only",
                    SIZES,
                    "ask about one picture at a time, or export with `check` inputs that have several",
                )
            sizes, pictures = [size for size, _ in found], self._encode_sized(found)
        else:
            if grids is not None and PIXELS in given and self.packed:
                check_grids(grids, len(given[PIXELS]), self._merge(), visual)
            pictures = self.encode(given.get(PIXELS), grids)
        rows = 0 if pictures is None else len(pictures[FEATURES])
        if rows != (wanted := int(visual.sum())):
            raise RunnerError(
                f"the prompt has {wanted} image tokens (id {self.image_token}), the pictures give {rows}",
                IDS,
                "build the inputs with the model's own processor, one picture for each picture in the text",
            )
        steps = Steps(self, mask, self._positions(visual, mask, grids, sizes))
        logits = steps.prefill(ids, pictures)
        open_rows = np.ones(len(ids), bool)
        for step in range(length):
            token = np.where(open_rows, choice.next(logits, ids, prompt, chance), choice.pad)
            yield token
            ids = np.concatenate([ids, token[:, None]], axis=1)
            open_rows &= ~np.isin(token, choice.ends)
            if not open_rows.any() or step + 1 == length:
                break
            logits = steps.decode(token[:, None])

    def encode(self, pixel_values: Array | None, image_grid_thw: Array | None = None) -> dict[str, Array] | None:
        """The visual tokens of all pictures in order, `image_features: f[N, C]`, and what else is said of each."""
        shapes = {entry.name: entry.shape for entry in self.vision.get_inputs()}
        if (image_grid_thw is None) != (pixel_values is None or not self.packed):
            what = "needs" if image_grid_thw is None else "has no use for"
            raise RunnerError(f"this model {what} {GRID}", GRID, "build the inputs with the model's own processor")
        if pixel_values is None:
            return None
        check_pixels(pixel_values, shapes.get(PIXELS, shapes.get(PATCHES, [])))
        if image_grid_thw is None:
            results = run(self.vision, {PIXELS: pixel_values}, options=_once())
            return {name: value.numpy() for name, value in results.items()}
        # Patches of different pictures do not see each other, so time and memory grow with the largest picture alone.
        grids = np.asarray(image_grid_thw, np.int64)
        parts: list[dict[str, ort.OrtValue]] = []
        for grid, patches in zip(grids, np.split(pixel_values, np.cumsum(grids.prod(1))[:-1]), strict=True):
            feeds = {PIXELS: patches, PATCHES: patches}
            feeds |= patch_layout(grid[None], self.config["vision_config"])
            parts.append(run(self.vision, feeds, options=_once()))
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    def _encode_sized(self, pictures: Sequence[tuple[Size, Mapping[str, Array]]]) -> dict[str, Array] | None:
        """As `encode`, each picture by the graph of its size."""
        parts: list[dict[str, ort.OrtValue]] = []
        for size, feeds in pictures:
            if PIXELS in feeds:
                check_pixels(feeds[PIXELS], list(feeds[PIXELS].shape))
            parts.append(run(self.sized[size.graph], feeds, options=_once()))
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]} if parts else None

    def _positions(self, visual: Array, mask: Array, grids: Array | None, sizes: Sequence[Size]) -> Array:
        shape = next((entry.shape for entry in self.prefill.get_inputs() if entry.name == POSITIONS), [0, 0])
        text = text_positions(mask)
        if len(shape) == 2:
            return text
        if sizes:
            wanted = whole(shape[0], POSITIONS, 1, 16, str(self.folder / "prefill.onnx"))
            return sized_positions(visual, mask, sizes, wanted)
        axes = np.broadcast_to(text, (3, *text.shape))
        if grids is not None:
            axes = picture_positions(visual, mask, np.asarray(grids, np.int64), self._merge())
        return np.concatenate([text[None], axes])[4 - shape[0] :] if isinstance(shape[0], int) else axes

    def _merge(self) -> int:
        """A visual token covers so many rows and columns of patches."""
        vision = self.config.get("vision_config")
        merge = vision.get("spatial_merge_size", 1) if isinstance(vision, dict) else 1
        return whole(merge, "vision_config.spatial_merge_size", 1, 64, str(self.folder / "config.json"))

    def _vocabulary(self) -> int:
        """Number of tokens: the logits of a row."""
        shape = next((entry.shape for entry in self.prefill.get_outputs() if entry.name == LOGITS), [])
        return whole(shape[-1] if shape else None, LOGITS, 1, 2**31, str(self.folder / "prefill.onnx"))


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
            shapes = {entry.name: (1, *entry.shape[1:]) for entry in self.model.prefill.get_inputs()}
            shapes = {name: shape for name, shape in shapes.items() if _of_pictures(name)}
            pictures = {name: _zeros(shape, MOST_ZEROS // len(shapes)) for name, shape in shapes.items()}
        feeds: dict[str, Array] = {
            IDS: ids,
            **pictures,
            MASK: self.mask,
            POSITIONS: self.positions,
            VISUAL: visual,
            VALID: self.mask != 0,
            COUNT: np.arange(int(visual.sum(1).min())),
            **tables(self.model.masks, self.mask, visual),
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
        feeds |= tables(self.model.masks, self.mask)
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
            self.state[path if path.startswith(AS_NAMED) else f"past_key_values.{path}"] = value
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
    value, dtype = feeds[entry.name], _TYPES[entry.type]
    if value.dtype == np.bool_ and dtype is np.float32:
        value = np.where(value, 0.0, np.finfo(np.float32).min)  # a mask that is added
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, dtype=dtype))


def _of_pictures(name: str) -> bool:
    return name in OF_PICTURES or name.startswith(f"{ROWS}.")


def _shapes(session: ort.InferenceSession) -> dict[str, tuple[int, ...]]:
    """Sizes of the inputs of a graph; -1 for one that varies."""
    return {
        entry.name: tuple(size if isinstance(size, int) else -1 for size in entry.shape)
        for entry in session.get_inputs()
    }


def _without(arrays: Mapping[str, Array], *names: str) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if name not in names}


def _zeros(shape: tuple[Any, ...], most: int) -> Array:
    if not all(isinstance(size, int) and size >= 0 for size in shape) or math.prod(shape) > most:
        raise ValueError(f"a graph takes pictures of the shape {shape}")
    return np.zeros(shape, np.float32)


def _disagrees(what: str, error: Exception, folder: Path) -> RunnerError:
    """What onnxruntime or numpy say of a folder that is not what the runner expects."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return RunnerError(f"{what}: {type(error).__name__}: {first}", str(folder), NEW_FOLDER)
