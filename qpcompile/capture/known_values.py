"""While tracing: values that are known before the trace are computed at once, and may be read as numbers.

    sizes = grid.tolist()                       numbers, since `grid` is known
    rows = torch.arange(sizes[0])               known as well
    x = hidden[mask]                            %x = aten::index(%hidden, [@rows of mask])
    if hidden.sum() > 0:                        refused by torch: nothing is known of `hidden`

The exporter gives every tensor that a graph holds or takes a symbolic stand-in. A tensor without one is known, and so
is what is computed from known tensors only: neither is part of the graph, except as a constant where both meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

# Tensors made of numbers alone. Memory to be filled (zeros, empty) may be filled with what is not known.
_COUNTING = (torch.arange, torch.linspace, torch.tensor)
_FILLED = (torch.zeros, torch.ones, torch.full, torch.empty)
_PLACED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class KnownValues(TorchFunctionMode):
    """See the module's docstring; wraps the forward of a module inside of the exporter's own modes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute at once what is known, and pass everything else on, with known masks as positions."""
        kwargs = kwargs or {}
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        numbers = not any(isinstance(value, (torch.SymInt, torch.SymFloat)) for value in pytree.tree_leaves(args))
        if numbers and (all(map(_is_known, tensors)) if tensors else func in _COUNTING or _counts(func, kwargs)):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if func in _PLACED:
            args = (args[0], _positions(args[1]), *args[2:])
        if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave) and _repeats_known(args, kwargs):
            return _repeated(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def knowing(module: Any, known: dict[str, Any]) -> Iterator[None]:
    """While tracing `module`: its forward gets the arguments `known` besides those that are traced."""
    forward = module.forward

    def of_both(**given: Any) -> Any:
        with KnownValues():
            return forward(**given, **known)

    module.forward = of_both
    try:
        yield
    finally:
        del module.forward


def _is_known(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, FakeTensor)
        and not is_traceable_wrapper_subclass(value)
    )


def _counts(func: object, kwargs: dict[str, Any]) -> bool:
    """Whether a factory makes integers or truth values: masks and indices, which are read."""
    dtype = kwargs.get("dtype")
    return func in _FILLED and isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def _positions(index: Any) -> Any:
    """An index in which each known mask is the tensors of its positions: their number is known then."""
    parts = cast(tuple[Any, ...], index) if isinstance(index, tuple) else (index,)
    made: list[Any] = []
    for part in parts:
        if _is_known(part) and part.dtype == torch.bool:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                made += part.nonzero(as_tuple=True)
        else:
            made.append(part)
    return tuple(made)


def _repeats_known(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) > 1 and _is_known(args[1]) and "output_size" not in kwargs


def _repeated(x: torch.Tensor, repeats: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """repeat_interleave with known counts, as a lookup of known rows."""
    x, dim = (x.flatten(), 0) if dim is None else (x, dim)
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        rows = torch.arange(x.shape[dim]).repeat_interleave(repeats.cpu())
    return x.index_select(dim, rows.to(repeats.device))
