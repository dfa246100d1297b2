"""Abstract interpretation of Jinja templates: upper bounds on value sizes, for `chat_template.py`."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jinja2 import nodes as jinja

from qpcompile.emit.artifact.template.macros import goes_down, makes_namespace, sets_outer
from qpcompile.emit.artifact.template.values import Iteration, Scope, TextSize

# Limits on iterations of nested loops, and on the size of one value.
MOST_TURNS, MOST_SIZE, MOST_PRINTED, MOST_STEPS = 10**5, 5 * 10**8, 10**9, 20_000
MOST_LOOPS, MOST_CALLS = 6, 8
# Filters and methods whose result is at most the sum of their arguments.
_FILTERS = (
    "trim first last list upper lower capitalize title string safe sort unique reverse items dictsort abs select reject"
    " selectattr rejectattr default d sum min max"
)
_TEXT_METHODS = (
    "strip lstrip rstrip split rsplit splitlines startswith endswith upper lower title capitalize items keys values get"
    " index find rfind count isdigit isalpha isalnum isnumeric isspace isupper islower removeprefix removesuffix"
    " partition rpartition cycle"
)
_PLAIN, _METHODS = frozenset(_FILTERS.split()), frozenset(_TEXT_METHODS.split())
_MAPPED = _PLAIN | {"length", "tojson"}
_NUMBERS = frozenset({"index", "index0", "revindex", "revindex0", "length", "depth", "depth0"})
_ESCAPED, _MOST_INDENT, _MOST_FORMAT, _DIGITS = 8, 32, 64, 24


class Unbounded(Exception):
    """A template whose work may be unbounded; `line` is where."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class TemplateWalk:
    """One walk over a template. `state` holds the attributes of all namespaces, which outlive a loop iteration."""

    def __init__(self) -> None:
        self.state: Scope = {}
        self.turn = Iteration()
        self.spaces: set[str] = set()
        self.macros: dict[str, jinja.Macro] = {}
        self.calls: list[jinja.Macro] = []
        self.turns = 1.0
        self.loops = 0
        self.steps = 0
        self.printed = TextSize(0)
        self.recursive = self.nested = 0

    def run(self, template: jinja.Template) -> None:
        """Raises Unbounded for a template whose work may be unbounded."""
        self._body(template.body, {})
        # Structural recursion terminates on inputs, but a template may build values too deep for that.
        if self.recursive and self.nested:
            raise Unbounded("a macro calls itself, and lists are made of values", self.recursive)
        if self.recursive and (line := sets_outer(template)):
            raise Unbounded("a macro calls itself, and a macro sets what outlives its call", line)

    def _body(self, body: list[jinja.Node], scope: Scope) -> None:
        for node in body:
            self._count(node)
            statement: Callable[[Any, Scope], None] | None = getattr(self, f"_on_{type(node).__name__.lower()}", None)
            if statement is None:
                raise Unbounded(f"{type(node).__name__.lower()} is not read", node.lineno)
            statement(node, scope)

    def _count(self, node: jinja.Node) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Unbounded("it calls itself too often", node.lineno)

    def _on_output(self, node: jinja.Output, scope: Scope) -> None:
        for part in node.nodes:
            size = TextSize(len(part.data)) if isinstance(part, jinja.TemplateData) else self.size(part, scope)
            self.printed += size.times(self.turns)
            if self.printed.plain > MOST_PRINTED:
                raise Unbounded(f"it prints {self.printed.plain:.3g} characters", node.lineno)

    def _on_assign(self, node: jinja.Assign, scope: Scope) -> None:
        size = self.size(node.node, scope)
        if name := makes_namespace(node):
            self.spaces.add(name)
        else:
            self._bind(node.target, size, scope)

    def _on_assignblock(self, node: jinja.AssignBlock, scope: Scope) -> None:
        if node.filter is not None:
            raise Unbounded("a filter on a block is not read", node.lineno)
        self._bind(node.target, self._printed(node.body, scope), scope)

    def _on_if(self, node: jinja.If, scope: Scope) -> None:
        self.size(node.test, scope)
        branches = [node.body, *([branch] for branch in node.elif_), node.else_]
        after = []
        for branch in branches:
            own = dict(scope)
            self._body(list(branch), own)
            after.append(own)
        for name in {name for own in after for name in own}:
            for own in after:
                if name in own:
                    scope[name] = scope[name] | own[name] if name in scope else own[name]

    def _on_macro(self, node: jinja.Macro, scope: Scope) -> None:
        if self.macros.setdefault(node.name, node) is not node:
            raise Unbounded(f"the macro {node.name} is there twice", node.lineno)

    def _on_continue(self, node: jinja.Continue, scope: Scope) -> None:
        """Ends an iteration early."""

    _on_break = _on_continue

    def _on_for(self, node: jinja.For, scope: Scope) -> None:
        over = self.size(node.iter, scope)
        if node.recursive:
            raise Unbounded("a loop that calls itself", node.lineno)
        turns, before = max(over.plain, 1), dict(self.state)
        self.loops += 1
        if self.turns * turns > MOST_TURNS or self.loops > MOST_LOOPS:
            raise Unbounded(f"{self.loops} loops in loops make {self.turns * turns:.0f} turns", node.lineno)
        # A value carried by the outer loop must not be added in every inner iteration.
        inner = {name: replace(size, carry=math.inf if size.carry else 0) for name, size in scope.items()}
        self._bind(node.target, over, inner)
        inner["loop"] = over
        if node.test is not None:
            self.size(node.test, inner)
        outer, self.turn = self.turn, Iteration()
        # Twice, because a number before the loop may be a text after the first iteration.
        for _ in range(2):
            self.state = {name: TextSize(0, 1, size.number) for name, size in self.state.items()}
            self.turns *= turns
            self._body(node.body, dict(inner))
            self.turns /= turns
        self.loops -= 1
        if any(size.carry > 1 for size in self.state.values()):
            raise Unbounded("a value grows by itself on every turn of a loop", node.lineno)
        # A loop over an outer-carried value adds growth in proportion to that value.
        turn, self.turn = self.turn, outer
        added = self._largest(turn.grown).plain if turn.grown else 0
        # A value is at most the largest before the loop or the largest fresh one, plus the growth of every iteration.
        largest = self._largest(before) | self._largest(turn.fresh)
        largest = self._kept(largest + TextSize(added * turns, over.carry * added if added else 0), node)
        after = {name: before[name] | turn.fresh[name] if name in before else turn.fresh[name] for name in turn.fresh}
        after |= dict.fromkeys(turn.grown, largest)
        for name in after:
            self.turn.sets(name, largest if name in turn.grown else turn.fresh[name])
            after[name] = replace(after[name], number=self.state[name].number)
        self.state = before | after
        self._body(node.else_, dict(scope))

    def _bind(self, target: jinja.Node, size: TextSize, scope: Scope) -> None:
        size = self._kept(size, target)
        if isinstance(target, jinja.Name) and target.name not in self.spaces:
            scope[target.name] = size
        elif isinstance(target, jinja.Tuple):
            for item in target.items:
                self._bind(item, size, scope)
        elif isinstance(target, jinja.NSRef):
            if size.carry > 1:
                raise Unbounded(f"{target.attr} grows by itself on every turn of a loop", target.lineno)
            self.turn.sets(target.attr, size)
            self.state[target.attr] = size | self.state[target.attr] if target.attr in self.state else size
        else:
            raise Unbounded(f"{type(target).__name__.lower()} is not set", target.lineno)

    def _kept(self, size: TextSize, node: jinja.Node) -> TextSize:
        if size.plain > MOST_SIZE:
            raise Unbounded(f"a value of the size {size.plain:.3g}", node.lineno)
        return size

    def _printed(self, body: list[jinja.Node], scope: Scope) -> TextSize:
        """The printed output as a value, counted once per iteration of inner loops."""
        printed, turns = self.printed, self.turns
        self.printed, self.turns = TextSize(0), 1.0
        self._body(body, scope)
        found, self.printed, self.turns = self.printed, printed, turns
        return found

    def size(self, node: Any, scope: Scope) -> TextSize:
        """The size of an expression."""
        self._count(node)
        rule: Callable[[Any, Scope], TextSize] | None = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if rule is None:
            raise Unbounded(f"{type(node).__name__.lower()} is not read", node.lineno)
        return self._kept(rule(node, scope), node)

    def _all(self, parts: Any, scope: Scope) -> TextSize:
        total = TextSize(0)
        for part in parts:
            total += self.size(part, scope)
        return total

    def _of_const(self, node: jinja.Const, scope: Scope) -> TextSize:
        value = node.value
        if isinstance(value, str):
            return TextSize(max(len(value), 1))
        if isinstance(value, float) and abs(value) < 1:
            raise Unbounded("a fraction is not read", node.lineno)
        return TextSize(max(abs(value), 1) if isinstance(value, (int, float)) else 1, number=True)

    def _of_name(self, node: jinja.Name, scope: Scope) -> TextSize:
        if node.name in self.spaces:
            raise Unbounded(f"the namespace {node.name} is handed on", node.lineno)
        return scope.get(node.name, TextSize())

    def _of_getattr(self, node: jinja.Getattr, scope: Scope) -> TextSize:
        if self._is_space(node.node):
            return self.state.get(node.attr, TextSize(1))
        inner = self.size(node.node, scope)
        if isinstance(node.node, jinja.Name) and node.node.name == "loop" and "loop" in scope:
            return replace(inner, number=inner.number or node.attr in _NUMBERS)
        return inner

    def _of_getitem(self, node: jinja.Getitem, scope: Scope) -> TextSize:
        for part in node.arg.iter_child_nodes() if isinstance(node.arg, jinja.Slice) else [node.arg]:
            self.size(part, scope)
        if self._is_space(node.node):
            return self._largest(self.state)
        return self.size(node.node, scope)

    def _is_space(self, node: jinja.Node) -> bool:
        return isinstance(node, jinja.Name) and node.name in self.spaces

    def _largest(self, sizes: Scope) -> TextSize:
        return functools.reduce(operator.or_, sizes.values(), TextSize(1))

    def _of_list(self, node: jinja.List, scope: Scope) -> TextSize:
        self.nested += not all(isinstance(item, jinja.Const) for item in node.items)
        return self._all(node.items, scope) + TextSize(len(node.items))

    _of_tuple = _of_list

    def _of_dict(self, node: jinja.Dict, scope: Scope) -> TextSize:
        self.nested += not all(isinstance(pair.value, jinja.Const) for pair in node.items)
        return self._all([part for pair in node.items for part in (pair.key, pair.value)], scope) + TextSize(1)

    def _of_condexpr(self, node: jinja.CondExpr, scope: Scope) -> TextSize:
        self.size(node.test, scope)
        other = self.size(node.expr2, scope) if node.expr2 is not None else TextSize(1)
        return self.size(node.expr1, scope) | other

    def _of_or(self, node: jinja.BinExpr, scope: Scope) -> TextSize:
        return self.size(node.left, scope) | self.size(node.right, scope)

    _of_and = _of_or

    def _of_concat(self, node: jinja.Concat, scope: Scope) -> TextSize:
        total = TextSize(0)
        for part in node.nodes:
            size = self.size(part, scope)
            total += TextSize(_DIGITS) if size.number else size
        return total

    def _of_add(self, node: jinja.BinExpr, scope: Scope) -> TextSize:
        return self.size(node.left, scope) + self.size(node.right, scope)

    _of_sub = _of_add

    def _of_mul(self, node: jinja.BinExpr, scope: Scope) -> TextSize:
        left, right = self.size(node.left, scope), self.size(node.right, scope)
        if left.carry or right.carry:
            raise Unbounded("a product of what loops make", node.lineno)
        return TextSize(left.plain * right.plain, number=left.number and right.number)

    def _of_mod(self, node: jinja.BinExpr, scope: Scope) -> TextSize:
        left, right = self.size(node.left, scope), self.size(node.right, scope)
        if not left.number:
            raise Unbounded("% with a text on its left, which fills it with spaces", node.lineno)
        return left | right

    _of_div = _of_floordiv = _of_mod

    def _of_neg(self, node: jinja.UnaryExpr, scope: Scope) -> TextSize:
        return self.size(node.node, scope)

    def _of_not(self, node: jinja.Not, scope: Scope) -> TextSize:
        self.size(node.node, scope)
        return TextSize(1, number=True)

    def _of_compare(self, node: jinja.Compare, scope: Scope) -> TextSize:
        self._all([node.expr, *(operand.expr for operand in node.ops)], scope)
        return TextSize(1, number=True)

    def _of_test(self, node: jinja.Test, scope: Scope) -> TextSize:
        self._all([node.node, *node.args], scope)
        return TextSize(1, number=True)

    def _of_filter(self, node: jinja.Filter, scope: Scope) -> TextSize:
        if node.node is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise Unbounded("a filter on a block is not read", node.lineno)
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        return self._called(node.name, self.size(node.node, scope), arguments, node, scope, _PLAIN)

    def _of_call(self, node: jinja.Call, scope: Scope) -> TextSize:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise Unbounded("a call with * is not read", node.lineno)
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        if isinstance(node.node, jinja.Getattr):
            inner = self.size(node.node.node, scope)
            return self._called(node.node.attr, inner, arguments, node, scope, _METHODS)
        name = node.node.name if isinstance(node.node, jinja.Name) else ""
        if name in self.macros:
            return self._macro(self.macros[name], arguments, node, scope)
        if name == "namespace":
            for pair in node.kwargs:
                self._bind(jinja.NSRef("", pair.key, lineno=node.lineno), self.size(pair.value, scope), scope)
            return TextSize(1)
        if name == "strftime_now" and len(arguments) == 1 and isinstance(arguments[0], jinja.Const):
            return TextSize(min(len(str(arguments[0].value)), _MOST_FORMAT) * _ESCAPED)
        self.nested += name == "dict"
        total = self._all(arguments, scope)
        if name not in ("range", "dict", "raise_exception"):
            raise Unbounded(f"a call of {name or 'a value'} is not read", node.lineno)
        return replace(total, number=name == "range")

    def _called(
        self, name: str, inner: TextSize, arguments: list[Any], node: jinja.Node, scope: Scope, plain: frozenset[str]
    ) -> TextSize:
        """A filter or a method on a value."""
        sizes = [self.size(argument, scope) for argument in arguments]
        constants = [argument.value for argument in arguments if isinstance(argument, jinja.Const)]
        if isinstance(node, jinja.Filter) and name == "map":
            named = [argument.value for argument in node.args if isinstance(argument, jinja.Const)]
            if len(named) == len(node.args) and all(value in _MAPPED for value in named[:1]):
                return inner.times(_ESCAPED)
        if name == "tojson":
            arguments = [argument for argument in arguments if not _is_pair(argument)]
        if name in ("length", "count", "wordcount") and not arguments:
            return replace(inner, number=True)
        if name in ("tojson", "indent") and len(constants) == len(arguments):
            wide = [value for value in constants if not isinstance(value, bool) and isinstance(value, (int, str))]
            width = max((value if isinstance(value, int) else len(value) for value in wide), default=1)
            if width <= _MOST_INDENT:
                return inner.times(_ESCAPED * max(width, 1))
        if name in ("e", "escape"):
            return inner.times(_ESCAPED)
        if name in ("join", "replace") and all(size.carry == 0 for size in sizes):
            return inner.times(1 + max((size.plain for size in sizes), default=0))
        if name in plain:
            # A default value may be the result; other arguments are options and are not part of the result.
            stands_in = {"get": sizes[1:], "default": sizes, "d": sizes, "cycle": sizes, "sum": sizes}.get(name, [])
            found = functools.reduce(operator.or_, stands_in, inner)
            return replace(found, number=name in ("index", "find", "rfind") or (name == "abs" and inner.number))
        if name in ("int", "float", "round") and inner.number and not arguments:
            return inner
        raise Unbounded(f"{name} is not read with these arguments", node.lineno)

    def _macro(self, macro: jinja.Macro, arguments: list[Any], node: jinja.Call, scope: Scope) -> TextSize:
        if self.calls and macro is self.calls[-1] and goes_down(macro, node):
            self.recursive = node.lineno
            return self._all([*arguments, *macro.defaults], scope).times(_ESCAPED)
        if macro in self.calls or len(self.calls) >= MOST_CALLS:
            raise Unbounded(f"the macro {macro.name} calls itself, or calls too many", node.lineno)
        sizes = [self.size(each, scope) for each in node.args]
        rest = replace(self._all([*(pair.value for pair in node.kwargs), *macro.defaults], scope), number=False)
        inner = dict(scope)
        for place, argument in enumerate(macro.args):
            self._bind(argument, sizes[place] if place < len(sizes) else rest, inner)
        self.calls.append(macro)
        found = self._printed(macro.body, inner)
        self.calls.pop()
        return found


def _is_pair(node: jinja.Node) -> bool:
    """Whether a node is two short texts: the separators of JSON."""
    return isinstance(node, jinja.Tuple) and all(
        isinstance(item, jinja.Const) and isinstance(item.value, str) and len(item.value) <= 2 for item in node.items
    )
