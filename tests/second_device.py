"""A second device that computes on the CPU: `torch.device("second")`; and a compile there compared with one here.

    python tests/second_device.py tests/testbed/llava quota-30 calibration.samples=8

torch's hook for back ends written in Python (`privateuseone`). Every operator computes on the CPU; one that gets
tensors of both devices fails, as on an accelerator. Only copies may cross; numbers without axes are welcome on both. It
is registered for the process, before the first backward pass: tests run this file in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from families import llava
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.samples import Samples
from qpcompile.evaluate.run.workbench import copied
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.pass_list import passes
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.recipe.recipe import Recipe

NAME = "second"
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
# Smaller tensors may be worked on anywhere: factors of a transform, tables of positions.
LARGE = 1000
PRODUCTS = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "convolution",
    "round",
    "linalg_cholesky_ex",
    "linalg_solve_triangular",
)


class OnSecond(torch.Tensor):
    """A tensor of the second device; `held` is its content."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[OnSecond], held: torch.Tensor) -> OnSecond:
        place = torch.device(NAME, 0)
        sizes = held.size(), held.stride(), held.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(cls, *sizes, dtype=held.dtype, device=place)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        """The content as Python numbers, which torch refuses for subclasses."""
        return self.held.tolist()


def computed(function: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator on the contents of its tensors."""
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    own = {id(leaf.held): leaf for leaf in given if isinstance(leaf, OnSecond)}
    foreign = [leaf for leaf in given if not isinstance(leaf, OnSecond) and leaf.ndim]
    if foreign and function not in COPIES:
        raise RuntimeError(f"{function} got tensors on {NAME} and on {foreign[0].device}")
    results = function(*_inner(args), **_inner(kwargs))
    target = kwargs.get("device") if function is aten._to_copy.default else None
    if target is not None and target.type == "cpu":
        return results
    return pytree.tree_map_only(
        torch.Tensor, lambda each: own[id(each)] if id(each) in own else OnSecond(each), results
    )


def _inner(values: Any) -> Any:
    values = pytree.tree_map_only(OnSecond, lambda each: each.held, values)
    return pytree.tree_map_only(torch.device, lambda each: CPU if each.type == NAME else each, values)


class _Module(_DummyBackendModule):
    """What torch asks the module of a device for; checkpointing asks for mixed precision even where it is off."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """No type: there is no mixed precision."""
        return []


class Work(TorchDispatchMode):
    """Counts large matrix products, roundings and operators of ours, by device."""

    def __init__(self) -> None:
        super().__init__()
        self.done: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        counts = function.namespace == "qpcompile" or function._opname in PRODUCTS
        if counts and max((each.numel() for each in given), default=0) >= LARGE and not _fake(given):
            self.done.setdefault(given[0].device.type, Counter())[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _fake(given: list[torch.Tensor]) -> bool:
    return any(isinstance(each, torch._subclasses.FakeTensor) for each in given)


def compiled(program: Program, samples: Samples, device: torch.device | None) -> tuple[Program, Work]:
    """A copy of a stubbed program after all passes, and what was computed where."""
    made = copied(program, program.recipe)
    made.device = device
    with Work() as work:
        for item in passes(samples, len(samples)):
            run_passes(made, [] if item.name in made.history else [item])
    return made, work


def differences(one: Program, other: Program) -> dict[str, Any]:
    """What differs between two compiles: parts of the plan, the largest share of codes, the largest relative error."""
    codes, numbers = [0.0], [0.0]
    for name, graph in one.graphs.items():
        tensors, others = graph.module.state_dict(), other.graphs[name].module.state_dict()
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                size = float(tensor.double().norm())
                numbers.append(float((tensor.double() - others[key].double()).norm()) / (size or 1.0))
            else:
                codes.append(float((tensor != others[key]).double().mean()))
    mine, theirs = one.plan, other.plan
    sites = [[(site.graph, site.name, site.kernel) for site in plan.sites] for plan in (mine, theirs)]
    layers = [[cut.layer for cut in plan.cuts] for plan in (mine, theirs)]
    same = (mine.candidate_layers, mine.left_out) == (theirs.candidate_layers, theirs.left_out)
    return {
        "same_plan": same and sites[0] == sites[1] and layers[0] == layers[1],
        "ratios": _apart([cut.ratio for cut in mine.cuts], [cut.ratio for cut in theirs.cuts]),
        "codes": max(codes),
        "numbers": max(numbers),
        "site_errors": _apart([site.error for site in mine.sites], [site.error for site in theirs.sites]),
        "training": _apart([block.after for block in mine.trained], [block.after for block in theirs.trained]),
        "sensitivity": _apart([layer.raw for layer in mine.sensitivity], [layer.raw for layer in theirs.sensitivity]),
    }


def _apart(mine: list[Any], theirs: list[Any]) -> float:
    """The largest relative difference of two lists of numbers, None among them."""
    pairs = [(left, right) for left, right in zip(mine, theirs, strict=True) if left is not None]
    return max((abs(left - right) / max(abs(left), 1e-6) for left, right in pairs), default=0.0)


def main() -> None:
    """Compile here and there; print the differences and where the work was done, as JSON."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda function, *args, **kwargs: computed(function, args, kwargs), "PrivateUse1")
    source, name, *settings = sys.argv[1:]
    recipe = Recipe.load(name).with_overrides(settings)
    if source == "tiny":
        (model, cases), processor = llava(), None
        samples = Samples([cases["one"], cases["one"]], None, 2, 0)
    else:
        model, processor = load_model(source)
        folder = Path(__file__).parent / "testbed" / "calibration" / Path(source).name.removesuffix("-outliers")
        samples = Samples(folder, processor, recipe.calibration.samples, recipe.calibration.seed)
    program = capture(model, samples.example(), recipe)
    run_passes(program, [Canonicalize(), InsertQuantStubs()])
    here, _ = compiled(program, samples, None)
    there, work = compiled(program, samples, torch.device(NAME, 0))
    print(json.dumps({**differences(here, there), "work": work.done}))


if __name__ == "__main__":
    main()
