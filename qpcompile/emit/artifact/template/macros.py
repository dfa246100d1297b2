"""Recursive macros: accepted only with structural recursion on their first argument.

    {% macro show(x) %}{% for key, value in x | dictsort %}{{ show(value) }}{% endfor %}{% endmacro %}

A recursive call may pass on a part of the macro's first argument, and unchanged values. A text has no parts smaller
than its characters, which contain themselves; so without a counter such a macro terminates, or hits Python's recursion
limit. With a counter it could call itself 2**60 times: counters are other arguments, slices of a text, ranges, and
values in outer namespaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes as jinja

_ENTRIES = frozenset({"items", "values", "keys"})


def goes_down(macro: jinja.Macro, call: jinja.Call) -> bool:
    """Whether a recursive call passes on a part of the macro's first argument and otherwise only unchanged values."""
    if not macro.args or not call.args or call.dyn_args is not None or call.dyn_kwargs is not None:
        return False
    bound = list(_bound(macro))
    parts = _parts(macro, bound)
    kept = {argument.name for argument in macro.args} - {name for name, _ in bound}
    first, *rest = [*call.args, *(pair.value for pair in call.kwargs)]
    return _is_part(first, parts) and all(
        isinstance(each, jinja.Const) or (isinstance(each, jinja.Name) and each.name in kept) or _is_part(each, parts)
        for each in rest
    )


def sets_outer(template: jinja.Template) -> int:
    """The line where a macro sets a value in a namespace that it did not create; 0 for none."""
    return next((line for macro in template.find_all(jinja.Macro) for line in _outer(macro.body, set())), 0)


def makes_namespace(node: jinja.Node) -> str:
    """The name a statement binds to a new namespace; "" for any other statement."""
    made = node.node if isinstance(node, jinja.Assign) else None
    is_space = isinstance(made, jinja.Call) and isinstance(made.node, jinja.Name) and made.node.name == "namespace"
    return node.target.name if is_space and isinstance(node.target, jinja.Name) else ""  # type: ignore[attr-defined]


def _outer(body: list[jinja.Node], own: set[str]) -> Iterator[int]:
    for node in body:
        if name := makes_namespace(node):
            own.add(name)
        elif isinstance(node, (jinja.Assign, jinja.AssignBlock)):
            targets = [node.target, *node.target.find_all(jinja.NSRef)]
            yield from (each.lineno for each in targets if isinstance(each, jinja.NSRef) and each.name not in own)
        # Definitions of one branch do not exist in another.
        for branch in (getattr(node, kind, None) for kind in ("body", "elif_", "else_")):
            if branch and not isinstance(node, jinja.Macro):
                yield from _outer(branch, set(own))


def _bound(macro: jinja.Macro) -> Iterator[tuple[str, Any]]:
    """(name, value) of all bindings in a macro; the value of a loop variable is its iterable, None is unknown."""
    for node in macro.find_all((jinja.For, jinja.Assign, jinja.AssignBlock, jinja.Macro)):
        if isinstance(node, jinja.Macro):
            yield from ((argument.name, None) for argument in node.args)
            continue
        value = _gone_over(node.iter) if isinstance(node, jinja.For) else getattr(node, "node", None)
        for name in [node.target, *node.target.find_all(jinja.Name)]:
            if isinstance(name, jinja.Name):
                yield name.name, value


def _gone_over(node: jinja.Node) -> jinja.Node:
    """The container a loop iterates over: `x` of `x`, of `x | dictsort` and of `x.items()`."""
    if isinstance(node, jinja.Filter) and node.name in ("dictsort", "items") and node.node is not None:
        return node.node
    if isinstance(node, jinja.Call) and isinstance(node.node, jinja.Getattr) and node.node.attr in _ENTRIES:
        return node.node.node
    return node


def _parts(macro: jinja.Macro, bound: list[tuple[str, Any]]) -> set[str]:
    """Names in a macro that are only bound to its first argument and parts of it."""
    parts = {macro.args[0].name, *(name for name, _ in bound)}
    while wrong := {name for name, value in bound if name in parts and not _is_part(value, parts)}:
        parts -= wrong
    return parts


def _is_part(node: Any, parts: set[str]) -> bool:
    """Whether an expression is one of these names, or an entry of one by a constant name or index."""
    if isinstance(node, jinja.Name):
        return node.name in parts
    if isinstance(node, jinja.Getattr):
        return _is_part(node.node, parts)
    if isinstance(node, jinja.Getitem):
        return isinstance(node.arg, jinja.Const) and _is_part(node.node, parts)
    if isinstance(node, jinja.Or):
        return _is_part(node.left, parts) and (_is_part(node.right, parts) or _is_constant(node.right))
    if isinstance(node, jinja.Filter) and node.name in ("default", "d"):
        stands_in = [*node.args, *(pair.value for pair in node.kwargs)]
        return _is_part(node.node, parts) and all(_is_constant(each) for each in stands_in)
    if isinstance(node, jinja.Call) and isinstance(node.node, jinja.Getattr) and node.node.attr == "get":
        named = [*node.args, *node.kwargs]
        return len(named) == 1 and isinstance(named[0], jinja.Const) and _is_part(node.node.node, parts)
    return False


def _is_constant(node: jinja.Node) -> bool:
    return isinstance(node, jinja.Const) or (isinstance(node, (jinja.List, jinja.Dict)) and not node.items)
