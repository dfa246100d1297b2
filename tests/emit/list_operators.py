"""Compile every family of the tests with several recipes and print the operators that the allow-list lacks.

python tests/emit/list_operators.py            # about an hour on one core
python tests/emit/list_operators.py llava      # one family
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from families import FAMILIES
from torch import fx

from qpcompile.capture.capture import capture
from qpcompile.emit.artifact.allowed_operators import OPERATORS
from qpcompile.emit.artifact.graph_json import FUNCTIONS
from qpcompile.ir.program import Program
from qpcompile.ir.text import target_text
from qpcompile.pipeline import compile_captured
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.recipe import Recipe

RTN = (
    *("quantize.transform=hadamard", "quantize.weights.solver=rtn", "quantize.smooth=null", "quantize.center=null"),
    "quantize.activations.clip_search=false",
)
LAYERS = "tokens.candidate_layers=[0, 1]"


def recipes(family: str) -> Iterator[Recipe]:
    """The recipes for a family; every method and number of bits on one of them."""
    yield Recipe.load("none")
    yield Recipe.load("quota-30").with_overrides([*RTN, LAYERS])
    if family == "llava":
        yield Recipe.load("w4a16").with_overrides(["quantize.weights.solver=rtn"])
        yield Recipe.load("w4a4kv4").with_overrides([*RTN, "quantize.kv_cache.bits=8"])
        yield Recipe.load("w4a4kv4").with_overrides([*RTN, "quantize.kv_cache.granularity=kivi"])
        for method in PRUNERS:
            if method not in ("joint", "quota"):
                yield Recipe.load("none").with_overrides([f"tokens.method={method}", "tokens.keep=0.4", LAYERS])


def operators(program: Program) -> set[str]:
    """The operators of all graphs, as a saved graph names them."""
    return {_name(node) for graph in program.graphs.values() for node in graph.nodes if node.op == "call_function"}


def _name(node: fx.Node) -> str:
    target = node.target
    return (
        f"{target._schema.name}.{target._overloadname}"
        if isinstance(target, torch._ops.OpOverload)
        else target_text(target)
    )


def missing(family: str) -> Iterator[tuple[Recipe, set[str]]]:
    """(recipe, operators missing from the allow-list) of one family."""
    model, cases = FAMILIES[family]()
    for recipe in recipes(family):
        program = capture(model, cases["one"], recipe)
        yield recipe, operators(compile_captured(program, None, None).program) - OPERATORS - FUNCTIONS.keys()


if __name__ == "__main__":
    torch.set_num_threads(1)
    lacking = set[str]()
    for name in sys.argv[1:] or FAMILIES:
        for asked, found in missing(name):
            lacking |= found
            print(f"{name}, {asked.tokens.method}: {', '.join(sorted(found)) or 'nothing is missing'}", flush=True)
    sys.exit(bool(lacking))
