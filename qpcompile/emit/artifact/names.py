"""Grammars of the names in an artifact: graphs, values, weights, inputs and outputs, modules, classes."""

from __future__ import annotations

import keyword
import re
from typing import Any

import torch

from qpcompile.ir.program import DECODE, EMBED, HEAD, PREFILL, PROJECTOR, VISION

GRAPHS = frozenset({VISION, PROJECTOR, PREFILL, DECODE, HEAD, EMBED})
MOST_CHARACTERS = 250
_PATH = re.compile(r"\w+(\.-?\w+)*", re.ASCII)
_OF_VALUES = re.compile(rf"({VISION}|{PROJECTOR})\.[1-9]\d?", re.ASCII)
_VALUE = re.compile(r"%(0|[1-9]\d{0,6})", re.ASCII)
# Attributes of every module: a weight of that name would shadow one.
_TAKEN = frozenset(dir(torch.nn.Module()))


def is_graph(name: Any) -> bool:
    """Whether a graph of a program may have this name."""
    return isinstance(name, str) and (name in GRAPHS or _OF_VALUES.fullmatch(name) is not None)


def is_path(name: Any) -> bool:
    """Whether this is a dotted name: of a module, an input (`past_key_values.3.key`, `kept.-1`), an output."""
    return isinstance(name, str) and len(name) <= MOST_CHARACTERS and _PATH.fullmatch(name) is not None


def are_paths(names: Any) -> bool:
    """Whether this is a list of dotted names, each once."""
    return isinstance(names, list) and all(map(is_path, names)) and len(set(names)) == len(names)


def is_value(label: Any) -> bool:
    """Whether this labels a value: `%12`."""
    return isinstance(label, str) and _VALUE.fullmatch(label) is not None


def is_weight(label: Any) -> bool:
    """Whether this labels a weight: `@layers.0.mlp.weight`, without Python keywords or torch module attributes."""
    if not isinstance(label, str) or not label.startswith("@") or not is_path(label[1:]):
        return False
    parts = label[1:].split(".")
    return not any("-" in part or keyword.iskeyword(part) or part in _TAKEN for part in parts)


def is_class(name: Any) -> bool:
    """Whether a class may have this name."""
    return isinstance(name, str) and len(name) <= MOST_CHARACTERS and name.isascii() and name.isidentifier()
