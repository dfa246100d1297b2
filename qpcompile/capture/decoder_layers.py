"""The decoder's layers in a traced graph: one list of modules, which other numbered modules are told apart from."""

from __future__ import annotations

from torch import fx

from qpcompile.errors import CaptureError
from qpcompile.ir.edit import layer_of
from qpcompile.ir.names import LAYER
from qpcompile.ir.program import Graph
from qpcompile.recipe.plan import Layer

_STACK = "nn_module_stack"


def layers_of(prefill: Graph) -> tuple[Layer, ...]:
    """The decoder's layers, found in the module stack of the prefill graph. Raises CaptureError if there are none."""
    indices = sorted({index for node in prefill.nodes if (index := layer_of(node)) is not None})
    if not indices:
        raise CaptureError(
            "no decoder layers were found in the prefill graph",
            where=prefill.owner,
            do="report this family: its decoder names its layers in a way that is not known",
        )
    return tuple(Layer(index=index, name=f"{prefill.owner}.layers.{index}") for index in indices)


def name_other_layers(graph: Graph) -> None:
    """Give the layers of other parts, such as a tower inside of the decoder, names that are no names of its layers.

    `vision_model.encoder.layers.0` becomes `vision_model.encoder.layers_0`. The decoder's list is the one that fills
    the cache.
    """
    lists = {kept for path in graph.outputs if path.in_cache and (kept := _list_of(graph.result(path))) is not None}
    if len(lists) != 1:
        return
    for node in graph.nodes:
        if (found := _list_of(node)) is not None and found not in lists:
            node.meta[_STACK] = {key: (_other(name, found), kind) for key, (name, kind) in node.meta[_STACK].items()}


def _list_of(node: fx.Node) -> str | None:
    """The name of the list that holds the outermost layer a node was traced in, as `layer_of` reads it."""
    for name, _ in node.meta.get(_STACK, {}).values():
        if match := LAYER.search(name):
            return name[: match.start(1)]
    return None


def _other(name: str, found: str) -> str:
    return f"{found[:-1]}_{name[len(found) :]}" if name.startswith(found) else name
