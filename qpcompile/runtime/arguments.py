"""Check the arguments of a component call against its graph: all by name, none unknown.

A graph computes what it was traced with. An argument without a graph input would be dropped silently and give a wrong
answer: that of a decoder without a cache, for example, after transformers renamed the cache.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from qpcompile.errors import CaptureError, InputError
from qpcompile.ir.program import Graph
from qpcompile.ir.structure import named_tensors
from qpcompile.ir.types import TYPE, UNKNOWN, value_types
from qpcompile.nested import is_list, is_mapping

# Flags of a call that select what is returned; they are not data. A graph's `constants` hold the traced ones.
FLAGS = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits")
# Arguments that are allowed without a graph input, whatever their value. Keep this short.
IGNORED = {
    "use_cache": "the decoder of a compiled model returns its cache or not as asked (run.py); others have none",
    "logits_to_keep": "rows are cut out by the host, of what the decoder returns and before the head sees them",
}
POSITIONS = "position_ids"
# Functions that layers call by the name of an attention.
_ATTENTION = ("transformers.integrations.", "transformers.modeling_flash", "transformers.masking_utils")
# Base classes of every model, which call no layers.
_SHARED = ("transformers.utils.", "transformers.generation.", "transformers.integrations.", "transformers.modeling_")
# The value of a flag that was not given when the graph was traced.
ABSENT: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}
Kinds = dict[str, tuple[torch.dtype, int]]
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_DO = (
    "leave the argument out; where transformers itself gives it, install a version of transformers that "
    "`qpcompile doctor` calls tested, or compile the model again with a sample that has the argument"
)


# Reading it takes as long as a layer of a decode step.
_signature = functools.cache(inspect.signature)


def keyword_arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of `module.forward`, all by name."""
    signature = _signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def split_flags(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flags, data) of a call; None values and ignorable arguments are in neither."""
    said = {name: value for name, value in arguments.items() if value is not None and name not in IGNORED}
    flags = {name: value for name, value in said.items() if name in FLAGS}
    return flags, {name: value for name, value in said.items() if name not in FLAGS}


def without_unread(module: torch.nn.Module, graph: Graph, data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without texts and numbers that no code of `module`, the component on the host, reads.

    transformers hands some settings of a model on to its tower, where nothing is called like them.
    """
    taken = _signature(type(module).forward).parameters
    known = {*taken, *graph.constants, *(path.root for path in graph.inputs)}
    return {
        name: value
        for name, value in data.items()
        if name in known or not isinstance(value, (str, bool, int, float)) or _is_read(module, name)
    }


def _is_read(module: torch.nn.Module, name: str) -> bool:
    """Whether the files with a component's code, or with the attention that its layers call, have a name in them."""
    homes = {kind.__module__ for part in module.modules() for kind in type(part).__mro__}
    homes = {home for home in homes if not home.startswith(("torch.", "builtins", *_SHARED))}
    homes |= {home for home in list(sys.modules) if home.startswith(_ATTENTION)}
    return any(_mentions(home, name) for home in homes)


@functools.cache
def _mentions(home: str, name: str) -> bool:
    """Whether the source of a module has a name in it; one that cannot be read may have any."""
    try:
        return re.search(rf"\b{re.escape(name)}\b", inspect.getsource(sys.modules[home])) is not None
    except (KeyError, OSError, TypeError):
        return True


def refuse_unknown(graph: Graph, flags: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuse a call with an argument the graph was not traced with.

    data: after `prepare`, by the names of the graph's inputs. Raises CaptureError naming component and argument: a
    tensor without an input, or a value other than the traced one.
    """
    for name, value in data.items():
        tensors = [path for path, _ in named_tensors(value, name)]
        if strangers := [path for path in tensors if path not in graph.inputs]:
            raise _refused(graph, f"the argument {strangers[0]}, a tensor that its graph has no input for")
        if not tensors and value is not None and not _empty(value):
            _refuse_other(graph, name, value)
    for name, value in flags.items():
        _refuse_other(graph, name, value)


def input_kinds(graph: Graph) -> Kinds:
    """Type and number of axes of each input of a graph, if known."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    kinds: Kinds = {}
    for path, node in zip(graph.inputs, placeholders, strict=True):
        traced, recorded = node.meta.get("val"), node.meta.get(TYPE, UNKNOWN)
        if isinstance(traced, torch.Tensor):
            kinds[path] = (traced.dtype, traced.ndim)
        elif recorded.dtype is not None:
            kinds[path] = (recorded.dtype, len(recorded.sizes))
    return kinds


def fitted(graph: Graph, kinds: Kinds, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a call, with integers cast to the width that the graph was traced with.

    Floating-point tensors may have any type: `prepare` casts them to the model's. Raises InputError naming an input
    with another number of axes or another kind of type.
    """
    given = {path: _on_axes(graph, kinds, path, tensor) for path, tensor in tensors.items()}
    for path, tensor in given.items():
        dtype, axes = kinds.get(path, (tensor.dtype, tensor.ndim))
        if tensor.ndim == axes and tensor.dtype != dtype and dtype in _WHOLE and tensor.dtype in (*_WHOLE, torch.bool):
            given[path] = tensor.to(dtype)
        elif tensor.ndim != axes or (tensor.dtype != dtype and not _floats(tensor.dtype, dtype)):
            raise InputError(
                f"{path} is {_kind(tensor.dtype)} with {tensor.ndim} axes; {graph.name} was traced with {_kind(dtype)} "
                f"and {axes}",
                where=path,
                do="build the inputs with the model's own processor, or compile with a sample of this kind",
            )
    return given


def _on_axes(graph: Graph, kinds: Kinds, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """Positions i64[B, S], which a family gives for text alone, on all axes of positions of the graph: i64[P, B, S]."""
    if path != POSITIONS or tensor.ndim != 2 or kinds.get(path, (tensor.dtype, 2))[1] != 3:
        return tensor
    node = [node for node in graph.nodes if node.op == "placeholder"][graph.inputs.index(path)]
    count = value_types(graph)[node].sizes[0].fixed
    return tensor if count is None else tensor.expand(count, -1, -1)


def _floats(*types: torch.dtype) -> bool:
    return all(each.is_floating_point for each in types)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_other(graph: Graph, name: str, value: Any) -> None:
    """Refuse a value that is not the one in the graph."""
    known = graph.constants.get(name, ABSENT.get(name))
    value = list(value) if is_list(value) else value  # as JSON has it
    if type(value) is type(known) and value == known:
        return
    was = "without it" if known is None else f"with {name}={known!r}"
    raise _refused(graph, f"the argument {name}={value!r}, and its graph was traced {was}")


def _empty(value: Any) -> bool:
    """Whether a nested value has nothing in it, like the features of no pictures, or masks that all are omitted."""
    if is_mapping(value):
        return all(map(_empty, value.values()))
    return all(map(_empty, value)) if is_list(value) else value is None


def _refused(graph: Graph, what: str) -> CaptureError:
    return CaptureError(f"{graph.name} was called with {what}", where=graph.owner or graph.name, do=_DO)
