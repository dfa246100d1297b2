"""What onnxruntime-genai does with a `decoder-pipeline`, on onnxruntime alone: for tests where it is not installed.

Kept to what a folder relies on: inputs that genai makes itself, inputs that are set by name, outputs that are handed on
by name to the graphs after them and to the next step, and greedy choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

__version__ = "stand-in"


class Config:
    """The configuration of a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.settings = json.loads((self.folder / "genai_config.json").read_text())

    def overlay(self, text: str) -> None:
        """Threads, which make no difference here."""
        assert set(json.loads(text)["model"]["decoder"]) == {"session_options"}


class Model:
    """Sessions of all graphs."""

    def __init__(self, config: Config | str) -> None:
        config = Config(config) if isinstance(config, str) else config
        self.model = config.settings["model"]
        (self.stages,) = self.model["decoder"]["pipeline"]
        assert self.model["type"] == "decoder-pipeline"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.sessions = {
            name: ort.InferenceSession(config.folder / stage["filename"], options)
            for name, stage in self.stages.items()
        }


class GeneratorParams:
    """Search options."""

    def __init__(self, model: Model) -> None:
        self.search: dict[str, Any] = {}

    def set_search_options(self, **options: Any) -> None:
        """Options of this prompt."""
        self.search |= options


class Generator:
    """One prompt and its answer."""

    def __init__(self, model: Model, params: GeneratorParams) -> None:
        self.model, self.longest = model, params.search["max_length"]
        self.set: dict[str, Any] = {}
        self.store: dict[str, Any] = {}
        self.tokens: list[int] = []
        self.new: list[int] = []
        self.logits: Any = np.empty(0)

    def set_model_input(self, name: str, value: Any) -> None:
        """An input that every graph which lists it gets."""
        self.set[name] = value

    def append_tokens(self, ids: Any) -> None:
        """Run the graphs on the prompt."""
        assert ids.dtype == np.int32 and not self.tokens
        self.tokens = ids.tolist()
        self._run(list(range(len(ids))))

    def is_done(self) -> bool:
        """Whether the answer is over."""
        ended = bool(self.new) and self.new[-1] in self.model.model["eos_token_id"]
        return ended or len(self.tokens) >= self.longest

    def generate_next_token(self) -> None:
        """Choose a token; the graphs run on it when the next one is asked for."""
        if not self.logits.size:
            self._run([len(self.tokens) - 1])
        self.new = [int(self.logits.argmax())]
        self.tokens += self.new
        self.logits = np.empty(0)

    def get_next_tokens(self) -> Any:
        """The token that was chosen."""
        return np.array(self.new, np.int32)

    def get_sequence(self, row: int) -> Any:
        """Prompt and answer."""
        return np.array(self.tokens, np.int32)

    def _run(self, positions: list[int]) -> None:
        names = self.model.model["decoder"]["inputs"]
        ids = [self.tokens[at] for at in positions]
        made = {names["input_ids"]: ids, names["attention_mask"]: [1] * len(self.tokens)}
        made[names["position_ids"]] = positions
        managed = {name: np.array([value], np.int64) for name, value in made.items()} | self.set
        logits = self.model.model["decoder"]["outputs"]["logits"]
        for name, stage in self.model.stages.items():
            if not stage["run_on_prompt" if len(positions) > 1 else "run_on_token_gen"]:
                continue
            for path in stage["outputs"]:
                self.store.pop(path, None)
            held = {**self.store, **managed}
            feeds = {path: held[path] for path in stage["inputs"] if path in held}
            results = self.model.sessions[name].run(stage["outputs"], feeds)
            for path, value in zip(stage["outputs"], results, strict=True):
                self.store[stage.get("output_names_forwarder", {}).get(path, path)] = value
        self.logits = self.store[logits]
        assert self.logits.shape == (1, 1, self.model.model["vocab_size"])
