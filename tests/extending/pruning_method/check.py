"""The method `loudest` is taken by recipes and cuts a decoder; `doctor` and the recipe reference know it."""

from __future__ import annotations

import torch
from extending.recipe_reference import recipe_page
from programs import program_of, run
from toy_decoder import decode_graph, prefill_graph, toy_feeds

from qpcompile.cli.doctor import needed_operators
from qpcompile.ir.program import PREFILL
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.pruning.table import check_method
from qpcompile.recipe.recipe import Recipe

recipe = Recipe.from_yaml("tokens: {method: loudest, keep: 0.5, options: {power: 4}}")
check_method(recipe)
program = program_of(prefill_graph(), decode_graph(), recipe=recipe, layers=2)
Canonicalize().run(program)
program.stage = "calibrated"
assert PlanTokenBudget().run(program) is False
InsertTokenCuts().run(program)

feeds = toy_feeds(1, 9) | {"attention_mask": torch.ones(1, 9, dtype=torch.bool)}
visual = torch.zeros(1, 9, dtype=torch.bool)
visual[0, 2:8] = True
given = feeds | {"visual_mask": visual, "valid_mask": feeds["attention_mask"], "visual_count": torch.arange(6)}
kept = run(program.graphs[PREFILL], **given)["kept.-1"]
loudness = feeds["inputs_embeds"].pow(4).sum(-1).masked_fill(~visual, -1)
expected = sorted([0, 1, *loudness[0].topk(3).indices.tolist(), 8])
assert kept.tolist() == [expected]

assert needed_operators(recipe) == ["rmsnorm", "rope", "select_tokens"]
row = "| `loudest` | Loudest: before the decoder, keep the visual tokens with the largest embeddings. |"
assert row in recipe_page()
assert "## `tokens.options of loudest`" in recipe_page()
assert "| `power` | integer, ≥ 1, ≤ 8 | `2` | The power of each channel in the sum. |" in recipe_page()
