"""The configuration that transformers' auto classes read from an artifact, once they know its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qpcompile.emit.artifact.settings import MODEL_TYPE

UNCOMPARED = {"dtype", "_name_or_path"}


class CompiledConfig(PreTrainedConfig):
    """The settings in config.json as they are; `qpcompile.load` reads them as the model's own configuration."""

    model_type = MODEL_TYPE


def register_config() -> None:
    """Let `AutoConfig` read the config.json of artifacts. A second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, CompiledConfig, exist_ok=True)


def changed_settings(config: Any, folder: Path) -> set[str]:
    """The settings of a configuration that differ from the folder's config.json, except path and type of numbers.

    Auto classes put arguments that have a setting's name into the configuration.
    """
    if not isinstance(config, CompiledConfig):
        return set() if config is None else {"config"}
    own, given = CompiledConfig.from_pretrained(folder), config
    left, right = own.to_dict(), given.to_dict()
    changed = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)} - {
        "dtype",
        "_name_or_path",
    }
    attention = own._attn_implementation, given._attn_implementation
    return changed | ({"attn_implementation"} if attention[0] != attention[1] else set())
