"""A pruning method is the file of its name: the recipe takes the name, and the file says what else is known of it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from programs import changed_recipe, program_of
from toy_decoder import prefill_graph

import qpcompile
from qpcompile.errors import RecipeError
from qpcompile.ir.edit import clone
from qpcompile.ir.operators import SELECT_TOKENS, SPECS
from qpcompile.ir.program import Graph
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import cut_prefill
from qpcompile.pruning.methods.joint import JointOptions
from qpcompile.pruning.pruner import INPUT, TowerReader, options_of
from qpcompile.pruning.scores import BEFORE
from qpcompile.pruning.table import PRUNERS, check_method
from qpcompile.recipe.choice import Score
from qpcompile.recipe.plan import Cut
from qpcompile.recipe.recipe import Recipe
from qpcompile.recipe.tokens import TokenScheme

# Methods whose layers are otherwise measured, or have no default.
GIVEN = ("quota", "random", "vtw")


def test_methods_are_those_of_the_recipe() -> None:
    assert ("none", *PRUNERS) == get_args(TokenScheme.model_fields["method"].annotation)


# Those that read a vision tower: test_tower_pruners.py.
@pytest.mark.parametrize("method", [name for name, pruner in PRUNERS.items() if not isinstance(pruner, TowerReader)])
def test_a_method_names_the_operators_that_it_adds(method: str) -> None:
    layers = ("tokens.candidate_layers=[0]",) if method in GIVEN else ()
    recipe = changed_recipe("none", f"tokens.method={method}", "tokens.keep=0.5", *layers)
    pruner, graph = PRUNERS[method], prefill_graph()
    program = program_of(graph, recipe=recipe, layers=2)
    Canonicalize().run(program)
    before, added = own_operators(graph), set[Any]()
    # What joint adds is the result of a search.
    searched: list[tuple[int, Score | None]] = [(INPUT, Score(name=name)) for name in BEFORE]
    searched += [(0, Score(name="text")), (0, Score(name="residual"))]
    known = [(layer, None) for layer in (() if method == "joint" else pruner.schedule(program).layers[:1])]
    for layer, score in searched if method == "joint" else known:
        cut = clone(graph)
        cuts = (Cut(layer=layer, ratio=0.5, numerator=1, denominator=2, score=score),)
        cut_prefill(cut, cuts, recipe, pruner, shapes=False)
        added |= own_operators(cut)
    assert added - before - {SELECT_TOKENS} == set(pruner.operators)


def own_operators(graph: Graph) -> set[Any]:
    """The project's operators in a graph."""
    return {node.target for node in graph.nodes} & {spec.overload for spec in SPECS}


def test_options_are_those_that_the_method_declares() -> None:
    recipe = changed_recipe("joint-30", "tokens.options.trial_samples=32")
    check_method(recipe)
    assert options_of(JointOptions, recipe).trial_samples == 32
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(RecipeError, match=r"joint cannot use its options:\n  trial_samples: .*integer >= 1"):
        check_method(changed_recipe("joint-30", "tokens.options.trial_samples=0"))
    with pytest.raises(RecipeError, match=r"quota cannot use its options:\n  trial_samples: ") as caught:
        check_method(changed_recipe("quota-30", "tokens.options.trial_samples=32"))
    assert caught.value.where == "tokens.options" and "its own keys are none" in str(caught.value.do)
    with pytest.raises(RecipeError, match=r"tokens\.options: given 3; allowed: a mapping"):
        changed_recipe("joint-30", "tokens.options=3")
    with pytest.raises(RecipeError, match=r"tokens\.options: given .*; allowed: a mapping"):
        changed_recipe("joint-30", "tokens.options={trial_samples: [1]}")
    with pytest.raises(RecipeError, match="joint cannot use its options"):
        qpcompile.compile("no/such/folder", changed_recipe("joint-30", "tokens.options.other=1"))
