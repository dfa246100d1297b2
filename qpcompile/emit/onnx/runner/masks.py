"""Which tokens see which, for decoders that take it as a table: bool[B, 1, new, S], from the rules in `masks.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.choice import whole
from qpcompile.emit.onnx.runner.folder import NEW_FOLDER, RunnerError, read_json
from qpcompile.emit.onnx.runner.inputs import MASK

Array = np.ndarray[Any, Any]

MASKS = "masks.json"
# Whose tokens also see later ones: nobody's, those of one picture each other, or all of the prompt.
TOGETHER = ("none", "pictures", "prompt")
MOST_MASKS = 16


@dataclass(frozen=True)
class MaskRule:
    """Tokens see themselves and earlier ones: the last `window` of them, or those of their `chunk`, where not 0."""

    window: int = 0
    chunk: int = 0
    together: str = "none"

    @classmethod
    def read(cls, entry: Any, where: str) -> MaskRule:
        """One entry of the file. Raises RunnerError for what no export writes."""
        if not isinstance(entry, dict) or set(entry) != {"window", "chunk", "together"}:
            raise RunnerError("an entry is no rule of a mask", where, NEW_FOLDER)
        if entry["together"] not in TOGETHER:
            raise RunnerError(f"together is {entry['together']!r}"[:100], where, NEW_FOLDER)
        window, chunk = (whole(entry[name], name, 0, 2**31, where) for name in ("window", "chunk"))
        return cls(window, chunk, entry["together"])

    def table(self, real: Array, visual: Array | None = None) -> Array:
        """bool[B, 1, new, S].

        Args:
            real: i64[B, S], 0 on padding.
            visual: bool[B, S], tokens of pictures, for a prompt; None for one new token after it.
        """
        keys = np.arange(real.shape[1])
        queries = keys if visual is not None else keys[-1:]
        seen = keys[None] <= queries[:, None]
        if self.window:
            seen = seen & (queries[:, None] - keys[None] < self.window)
        if self.chunk:
            seen = seen & (queries[:, None] // self.chunk == keys[None] // self.chunk)
        seen = np.broadcast_to(seen, (len(real), *seen.shape))
        if visual is not None and self.together == "pictures":
            # Runs of image tokens, counted from 1.
            starts = visual & ~np.pad(visual, ((0, 0), (1, 0)))[:, :-1]
            runs = np.where(visual, np.cumsum(starts, axis=1), 0)
            seen = seen | ((runs[:, :, None] == runs[:, None]) & visual[:, :, None])
        elif visual is not None and self.together == "prompt":
            seen = np.ones_like(seen)
        return (seen & (real != 0)[:, None])[:, None]


def read_masks(path: Path) -> dict[str, MaskRule]:
    """The rules of a folder by input of the decoder: `attention_mask`, or `attention_mask.<which>`."""
    entries = read_json(path).get("masks")
    if not isinstance(entries, dict) or len(entries) > MOST_MASKS:
        raise RunnerError(f"it lists no masks, or more than {MOST_MASKS}", str(path), NEW_FOLDER)
    if unknown := [name for name in entries if name.partition(".")[0] != MASK]:
        raise RunnerError(f"{unknown[0][:100]!r} is no mask of the decoder", str(path), NEW_FOLDER)
    return {name: MaskRule.read(entry, str(path)) for name, entry in entries.items()}


def tables(rules: Mapping[str, MaskRule], real: Array, visual: Array | None = None) -> dict[str, Array]:
    """The table of every rule, made once for all inputs with the same one."""
    made = {rule: rule.table(real, visual) for rule in set(rules.values())}
    return {name: made[rule] for name, rule in rules.items()}
