"""Operand rules: types and shapes of an operator, declared once (kernels/<op>/rule.py), checked wherever it is called.

    RULE = Rule(
        "qpcompile::linear_w8a16",
        {"x": "f[..., K]", "weight": "i8[N, K]", "weight_scale": "f32[N, 1]", "bias": "f[N]?"},
        gives=("=x[..., N]",),
        empty="...",
    )

The operands are in the order of the operator's arguments. A tensor form is its types, its sizes, and `?` if it may be
None; several forms of one operand are a tuple:

    types   f (f16, bf16, f32, f64), i (i32, i64), f32, u8, ..., several with |; =name for the type of that operand
    sizes   a number; a name, which is one number wherever it occurs; N|1; ceil(K/2); A*c; P+S; bytes(D, bits);
            groups(C, group_size); groups(A*c, group_size)
    ...     leading sizes, the same wherever they occur; ~... sizes that broadcast to them; *... any

Any other operand is a `Scalar`. A named size is at least 1 unless listed in `empty`: no rows in, no rows out.

One rule serves real tensors (operators), fake ones (while a graph is traced or edited) and whole graphs. Symbolic sizes
are compared by their example values (hints), so that no guard is added; one without a hint matches everything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.rule_text import FLOATS, NAMES, Form, SizePattern, read_form

_PLAIN = (Tensor, torch.nn.Parameter)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
Sizes = dict[str, Any]
"""Named sizes, integers by operand, types by operand, and the leading sizes as a tuple called `...`."""
MOST_KNOWN = 1024
Waiting = list[tuple[str, Tensor, SizePattern, Any]]
"""Size checks deferred until all named sizes are known: operand, its tensor, expected size, actual size."""


@dataclass(frozen=True)
class Scalar:
    """A non-tensor operand: what it must be, in words, and a predicate for values."""

    text: str
    accepts: Callable[[Any], bool]


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Scalar:
    """A finite number from `low` (or above it) to `high`."""
    words = ["a finite number"]
    words += [f"{'above' if above else 'from'} {low:g}"] * (low > -math.inf) + [f"up to {high:g}"] * (high < math.inf)

    def accepts(value: Any) -> bool:
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return finite and low <= value <= high and not (above and value == low)

    return Scalar(" ".join(words), accepts)


def count(least: int = 0, most: float = math.inf) -> Scalar:
    """An integer from `least` to `most`; a symbolic one is checked by its hint."""

    def accepts(value: Any) -> bool:
        whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        return whole and ((known := example(value)) is None or least <= known <= most)

    return Scalar(f"an integer of at least {least}" + (f" and at most {most}" if most < math.inf else ""), accepts)


def one_of(*values: Any) -> Scalar:
    """One of these values."""

    def accepts(value: Any) -> bool:
        return any(value.__class__ is each.__class__ and value == each for each in values)

    return Scalar(f"one of {', '.join(map(repr, values))}", accepts)


def numbers(length: int) -> Scalar:
    """A sequence of `length` finite numbers."""
    single = number()

    def accepts(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == length and all(map(single.accepts, value))

    return Scalar(f"{length} finite numbers", accepts)


FLAG = Scalar("True or False", lambda value: isinstance(value, bool))
FLOAT_TYPE = Scalar("one of f16, bf16, f32, f64", lambda value: isinstance(value, torch.dtype) and value in FLOATS)


@dataclass(frozen=True)
class Relation:
    """A constraint between named values (see `Sizes`), in words; `operand` is the one reported.

    Skipped if one of `names` is missing: an operand was left out, or a size has no hint. With `partial`, `holds` gets
    None for those instead.
    """

    operand: str
    text: str
    names: tuple[str, ...]
    holds: Callable[..., bool]
    partial: bool = False


def multiple(operand: str, large: str, small: str) -> Relation:
    """One named size is a multiple of another."""
    return Relation(operand, f"{large} must be a multiple of {small}", (large, small), lambda of, by: of % by == 0)


def grouped(channels: str) -> Relation:
    """`group_size` divides the channels, or is 0 for one group of them all."""
    return Relation(
        "group_size",
        f"group_size must be 0 or divide {channels}",
        (channels, "group_size"),
        lambda size, group: group == 0 or size % group == 0,
    )


class Rule:
    """The operands and results of the operator `name` (`qpcompile::rope`); see the module's docstring."""

    def __init__(
        self,
        name: str,
        operands: Mapping[str, str | tuple[str, ...] | Scalar],
        *,
        relations: Sequence[Relation] = (),
        gives: Sequence[str] = (),
        empty: str = "",
    ) -> None:
        self.name = name
        self.names = tuple(operands)
        self.relations = tuple(relations)
        self.gives = tuple(map(read_form, gives))
        self.empty = frozenset(empty.split())
        self.known: set[tuple[Any, ...]] = set()
        self.scalars: list[tuple[int, str, Scalar]] = []
        self.tensors: list[tuple[int, str, tuple[Form, ...]]] = []
        for place, (key, written) in enumerate(operands.items()):
            if isinstance(written, Scalar):
                self.scalars.append((place, key, written))
            else:
                forms = (written,) if isinstance(written, str) else written
                self.tensors.append((place, key, tuple(map(read_form, forms))))

    @property
    def signature(self) -> str:
        """All operands on one line, in order."""
        parts = {key: each.text for _, key, each in self.scalars}
        parts |= {key: _choice(forms) for _, key, forms in self.tensors}
        return ", ".join(f"{key}: {parts[key]}" for key in self.names)

    def check(self, *arguments: Any) -> None:
        """Refuse arguments, in the operator's order, that do not match; trailing ones may be left out.

        The layers of a model are called alike: accepted combinations of types and sizes are cached.
        Raises KernelError naming the operator and the operand, what it is and what it must be.
        """
        key = _key(arguments)
        try:
            if key in self.known:
                return
        except TypeError:  # an unhashable value in place of a number
            key = None
        self.sizes(*arguments)
        if key is not None:
            if len(self.known) == MOST_KNOWN:
                self.known.clear()
            self.known.add(key)

    def checked(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """`function`, which takes the operator's arguments, preceded by `check`."""

        @functools.wraps(function)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            self.check(*(self.arguments(args, kwargs) if kwargs else args))
            return function(*args, **kwargs)

        return run

    def sizes(self, *arguments: Any) -> Sizes:
        """The values of the named sizes for these arguments. Raises like `check`."""
        arguments += (None,) * (len(self.names) - len(arguments))
        sizes: Sizes = {}
        waiting: Waiting = []
        for place, key, scalar in self.scalars:
            value = sizes[key] = arguments[place]
            if not scalar.accepts(value):
                raise self.refused(key, f"{key} is {described(value)}, but must be {scalar.text}")
        device: torch.device | None = None
        for place, key, forms in self.tensors:
            tensor = arguments[place]
            if tensor is None and forms[0].optional:
                continue
            if not isinstance(tensor, Tensor):
                raise self.refused(key, f"{key} is {described(tensor)}, but must be {_choice(forms)}")
            device = device or tensor.device
            if tensor.device != device or tensor.layout is not torch.strided:
                raise self.refused(
                    key, f"{key} is {tensor.layout} on {tensor.device}, but must be torch.strided on {device}"
                )
            self._take(key, forms, tensor, sizes, waiting)
        self._compare(sizes, waiting)
        return sizes

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Positional and keyword arguments of a call in the operator's order, None for those left out."""
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return tuple(given.get(name) for name in self.names)

    def results(self, *arguments: Any) -> list[tuple[torch.dtype, tuple[Any, ...]]]:
        """Type and sizes of every result for these arguments. Raises like `check`."""
        sizes = self.sizes(*arguments)
        found = []
        for form in self.gives:
            leading = sizes["..."] if form.leading else ()
            like = [sizes[name] for name in form.like.split("+") if name]
            dtype = functools.reduce(torch.promote_types, like) if like else next(iter(form.types))
            found.append((dtype, (*leading, *(size.value(sizes) for size in form.sizes))))
        return found

    def fake(self, *arguments: Any) -> Any:
        """Empty results for these arguments, a tensor or a tuple of them. Raises like `check`."""
        results = self.results(*arguments)
        like = arguments[self.tensors[0][0]]
        made = tuple(like.new_empty(sizes, dtype=dtype) for dtype, sizes in results)
        return made[0] if len(made) == 1 else made

    def refused(self, operand: str, problem: str) -> KernelError:
        """The error for one operand."""
        return KernelError(problem, where=f"{self.name}, operand {operand}", do=f"give {self.signature}")

    def _take(self, key: str, forms: tuple[Form, ...], tensor: Tensor, sizes: Sizes, waiting: Waiting) -> None:
        """Match a tensor against its forms, and bind named sizes."""
        problem = ""
        for form in forms:
            # Bindings of a form that does not match are discarded.
            trial, later = (sizes, waiting) if len(forms) == 1 else (dict(sizes), list[Any]())
            problem = self._misfit(key, form, tensor, trial, later)
            if not problem:
                if len(forms) > 1:
                    sizes.update(trial)
                    waiting += later
                return
        raise self.refused(key, f"{key} is {described(tensor)}, but must be {_choice(forms)}: {problem}")

    def _misfit(self, key: str, form: Form, tensor: Tensor, sizes: Sizes, waiting: Waiting) -> str:
        """What is wrong with a tensor; empty if nothing is."""
        dtype, shape, own = tensor.dtype, tensor.shape, form.sizes
        sizes[key] = dtype
        if dtype not in form.types and (not form.like or sizes.get(form.like) is not dtype):
            return f"it is {sizes[form.like]}" if form.like in sizes else "another type"
        extra = len(shape) - len(own)
        if extra < 0 or (extra and not form.leading):
            return f"it has {len(shape)} dimensions"
        if form.leading and (problem := _leading(form.leading, tuple(shape[:extra]), sizes)):
            return problem
        for size, given in zip(own, shape[extra:], strict=True):
            name = size.names[0] if size.function is None and size.names else ""
            if size.or_one and given.__class__ is int and given == 1:
                continue
            wanted = size.number if not name else sizes.setdefault(name, given)
            if wanted is None:
                waiting.append((key, tensor, size, given))
            elif wanted is given:
                if name and name not in self.empty and example(given) == 0:
                    return f"{name} is 0"
            elif differ(wanted, given):
                return f"{size.text} is {wanted} and not {given}"
        return ""

    def _compare(self, sizes: Sizes, waiting: Waiting) -> None:
        """Check the deferred sizes."""
        for key, tensor, size, given in waiting:
            wanted = size.value(sizes)
            if wanted is not None and differ(wanted, given):
                raise self.refused(key, f"{key} is {described(tensor)}, but {size.text} is {wanted} and not {given}")
        for relation in self.relations:
            values = [example(sizes.get(name)) for name in relation.names]
            whole = relation.partial or not any(value is None for value in values)
            if whole and not relation.holds(*values):
                given = ", ".join(f"{name} is {value}" for name, value in zip(relation.names, values, strict=True))
                raise self.refused(relation.operand, f"{given}: {relation.text}")


def _key(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Types, sizes and devices of tensors, and the other arguments; None if a size may be symbolic."""
    parts: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            if each.__class__ not in _PLAIN:
                return None
            parts += (each.dtype, each.shape, each.device, each.layout)
        elif each.__class__ is list:
            parts.append(tuple(each))
        else:
            # 1, 1.0 and True are equal in Python.
            parts += (each.__class__, each)
    return tuple(parts)


def example(size: Any) -> Any:
    """The hint of a symbolic size, None if it has none; anything else unchanged."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def differ(left: Any, right: Any) -> bool:
    """Whether two sizes are known to differ."""
    if left.__class__ is not int or right.__class__ is not int:
        left, right = example(left), example(right)
    return left is not None and right is not None and left != right


def described(value: Any) -> str:
    """A tensor in the notation of rules: `f32[2, 5]`; anything else by its repr, shortened."""
    if isinstance(value, Tensor):
        return f"{NAMES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    if isinstance(value, torch.dtype):
        return NAMES.get(value, str(value))
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _choice(forms: tuple[Form, ...]) -> str:
    return " or ".join(form.text for form in forms)


def _leading(kind: str, given: tuple[Any, ...], sizes: Sizes) -> str:
    """What is wrong with the leading sizes of a tensor; empty if nothing is."""
    if kind == "*...":
        return ""
    wanted = sizes.setdefault("...", given)
    if wanted is given:
        return ""
    if kind == "...":
        if len(wanted) != len(given) or any(map(differ, wanted, given)):
            return f"... is {list(wanted)} and not {list(given)}"
        return ""
    spare = len(wanted) - len(given)
    if spare < 0 or any(
        differ(each, 1) and differ(each, full) for each, full in zip(given, wanted[spare:], strict=True)
    ):
        return f"{list(given)} does not broadcast to {list(wanted)}"
    return ""
