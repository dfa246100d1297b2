"""What an exported folder asks of a runtime that the runtime does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from qpcompile.emit.onnx.check import operators_with
from qpcompile.emit.onnx.runner.folder import CONTRIB, GRAPHS, WEIGHTS
from qpcompile.emit.onnx.runtimes import runtime

# Bytes of one array in Chrome, and of WebAssembly's memory (onnxruntime.ai, "Working with Large Models").
MOST_ARRAY, MOST_MEMORY = 0x7FE00000, 2**32


def demands(folder: Path, name: str) -> dict[str, Any]:
    """What `check.json` says of a runtime: its form, its settings, and in words what it lacks (`problems`)."""
    wanted = runtime(name)
    problems: list[str] = []
    loaded = 0
    for graph in GRAPHS:
        model = onnx.load(folder / graph, load_external_data=False)
        if model.functions and not wanted.functions:
            problems.append(
                f"{graph}: it reads no functions ({', '.join(sorted(each.name for each in model.functions))})"
            )
        content = onnx.inliner.inline_local_functions(model).graph
        for (domain, kind), count in sorted(Counter(_operators(content)).items()):
            lacking = kind not in wanted.contrib if domain == CONTRIB else kind in wanted.lacks
            if lacking:
                problems.append(f"{graph}: it has no {'.'.join(filter(None, (domain, kind)))} ({count} nodes)")
        for type_name, instead in wanted.types.items():
            if found := operators_with(folder / graph, onnx.TensorProto.DataType.Value(type_name)):
                problems.append(f"{graph}: {type_name.lower()} is {instead}: {', '.join(found)}")
        loaded += sum(_external_bytes(tensor) for tensor in content.initializer)
    if wanted.in_browsers:
        problems += _too_large((folder / WEIGHTS).stat().st_size, loaded)
    return {
        "name": name,
        "source": wanted.source,
        "fast": wanted.fast,
        "functions": wanted.functions,
        "settings": dict(wanted.settings),
        "problems": problems,
    }


def _operators(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Domain and name of every node, also of graphs in nodes."""
    for node in graph.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def _external_bytes(tensor: onnx.TensorProto) -> int:
    return sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _too_large(size: int, loaded: int) -> Iterator[str]:
    """size: bytes of the weights file; loaded: bytes of the weights of all graphs, shared ones in each."""
    if size > MOST_ARRAY:
        yield f"{WEIGHTS}: {size} bytes are more than one array of a browser holds ({MOST_ARRAY})"
    if loaded > MOST_MEMORY:
        yield f"{WEIGHTS}: its three graphs load {loaded} bytes; WebAssembly has {MOST_MEMORY}"
