"""Graphs of one set of values: sizes of pictures, masks and other arguments that a component's code reads as numbers.

Code that loops over pictures, or slices by their sizes, has another graph for every size. Such a graph is traced with
all arguments but floating-point tensors as constants; it answers calls that have exactly these values, and shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from qpcompile.ir.program import Graph
from qpcompile.nested import is_list, is_mapping
from qpcompile.runtime.arguments import ABSENT, split_flags

# Keys of `Graph.constants`: the digest of the values that a graph was traced with, and the same in words.
VALUES, SAID = "values", "values_said"
# Numbers that are spelled out, and the length of all words.
FEW, MOST_CHARACTERS = 12, 200


def of_call(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that select a graph: without those that are absent or ignored, and flags by default."""
    flags, data = split_flags(arguments)
    return data | {name: value for name, value in flags.items() if value != ABSENT[name]}


def varying(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that stay inputs of a graph of one set of values: those with a floating-point tensor in them."""
    return {
        name: value for name, value in arguments.items() if any(map(_is_varying, (item for _, item in _leaves(value))))
    }


def _is_varying(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def digest_of(arguments: Mapping[str, Any]) -> str:
    """SHA-256 of the values and shapes of a call's arguments; of floating-point tensors the shapes only."""
    total = hashlib.sha256()
    for name, value in _leaves(arguments):
        total.update(f"{name} {_kind(value)}\n".encode())
        if isinstance(value, torch.Tensor) and not _is_varying(value):
            total.update(value.detach().cpu().to(torch.int64).contiguous().numpy().tobytes())
    return total.hexdigest()


def of_values(graphs: Iterable[Graph], arguments: Mapping[str, Any]) -> Graph | None:
    """The graph of one component that was traced with the values of a call (`of_call`), if there is one."""
    key = digest_of(arguments)
    return next((graph for graph in graphs if graph.constants[VALUES] == key), None)


def fixed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments: constants of such a graph."""
    return {name: value for name, value in arguments.items() if name not in varying(arguments)}


def said(arguments: Mapping[str, Any]) -> str:
    """The same in words, for people: `grid_thw=[[1, 4, 6]], pixel_values [24, 48]`."""
    text = ", ".join(_words(name, value) for name, value in _leaves(arguments))
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _words(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor) and (_is_varying(value) or value.numel() > FEW):
        return f"{name} {list(value.shape)}"
    plain: Any = value
    return f"{name}={plain.tolist() if isinstance(value, torch.Tensor) else plain!r}"


def _kind(value: object) -> str:
    """What a leaf is apart from a tensor's contents. How many bits a number has does not count."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    kind = "float" if _is_varying(value) else "bool" if value.dtype == torch.bool else "int"
    return f"{kind} {list(value.shape)}"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists with its dotted name, sorted by key; None is left out."""
    if is_mapping(value):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{name}.{key}" if name else str(key))
    elif is_list(value):
        yield f"{name}.length", len(value)
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}.{place}")
    elif value is not None:
        yield name, value
