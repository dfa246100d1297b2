"""Parse one part of a printed graph (`ir/text.py`) into nodes and edges.

Size computations (`int`, `bool` scalars) are omitted: they would obscure the data flow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qpcompile.errors import InvariantError

_VALUE = re.compile(r"^(?P<name>%\d+) = (?P<call>.*?)(?: : (?P<type>[^:]+))?$")
_READ = re.compile(r"%\d+")
_WEIGHT = re.compile(r"@[\w.]+")
_SCALAR = re.compile(r"^(int|bool|float) ")


@dataclass(frozen=True)
class Node:
    """One value: its operator (or input), weights and type; `outside`: computed elsewhere; `leaves`: read elsewhere."""

    name: str
    operator: str
    weights: tuple[str, ...]
    type: str
    sources: tuple[str, ...]
    outside: bool = False
    leaves: tuple[str, ...] = ()


def layer_text(text: str, part: str) -> str:
    """The lines of a printed graph that belong to `part` (`layers.3`), unchanged."""
    lines = [line for line, owner in _owned(text) if owner == part]
    return "".join(f"{line}\n" for line in lines)


def layer_names(text: str) -> list[str]:
    """The numbered parts of a printed graph, in order, each once."""
    return list(dict.fromkeys(owner for _, owner in _owned(text) if re.search(r"\.\d+$|^\d+$", owner)))


def layer_nodes(text: str, part: str) -> list[Node]:
    """Nodes of `part` in order of definition, the values it reads from elsewhere first."""
    defined: dict[str, Node] = {}
    owners: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for line, owner in _owned(text):
        if line.startswith("return "):
            path, _, value = line.removeprefix("return ").partition(" = ")
            readers.setdefault(value, []).append(path)
        elif match := _VALUE.match(line):
            node = _node(match)
            defined[node.name], owners[node.name] = node, owner
            if owner != part:
                for source in node.sources:
                    readers.setdefault(source, []).append("")
    inside = [node for node in defined.values() if owners[node.name] == part and not _SCALAR.match(node.type)]
    if not inside:
        raise InvariantError(f"the printed graph has no part called {part}", where=text.split("\n", 1)[0])
    own = {node.name for node in inside}
    wanted = dict.fromkeys(source for node in inside for source in node.sources if source not in own)
    outside = [_from_outside(defined[name]) for name in wanted if not _SCALAR.match(defined[name].type)]
    shown = own | {node.name for node in outside}
    return outside + [_inside(node, shown, readers.get(node.name, [])) for node in inside]


def _owned(text: str) -> list[tuple[str, str]]:
    """(line, part it belongs to) of every line except comments; "" for inputs and lines before the first part."""
    found, owner = [], ""
    for line in text.splitlines():
        if line.startswith("# "):
            owner = line.removeprefix("# ")
        elif line.startswith(("%", "@", "return ")):
            found.append((line, "" if " = input " in line or line.startswith("return ") else owner))
    return found


def _node(match: re.Match[str]) -> Node:
    call = match["call"]
    operator = call if call.startswith("input ") else call.partition("(")[0]
    if operator == "operator.getitem":
        operator = f"item {call.rpartition(', ')[2].removesuffix(')')}"
    return Node(
        name=match["name"],
        operator=operator,
        weights=tuple(dict.fromkeys(name.removeprefix("@") for name in _WEIGHT.findall(call))),
        type=match["type"] or "",
        sources=tuple(dict.fromkeys(_READ.findall(call))),
    )


def _from_outside(node: Node) -> Node:
    return Node(node.name, node.operator.removeprefix("input "), (), node.type, (), outside=True)


def _inside(node: Node, shown: set[str], readers: list[str]) -> Node:
    """The node with its drawn edges; a returned value has the name of its output."""
    named = tuple(dict.fromkeys(path for path in readers if path)) or (("",) if readers else ())
    sources = tuple(source for source in node.sources if source in shown)
    return Node(node.name, node.operator, node.weights, node.type, sources, leaves=named)
