"""Rows of the report's tables."""

from __future__ import annotations

from qpcompile.inspect.tables import (
    error_tables,
    kernel_rows,
    left_out_rows,
    pass_purposes,
    pass_rows,
    settings,
    site_rows,
)
from qpcompile.ir.pass_manager import PassRun
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe


def test_step_becomes_what_changed_in_which_graph() -> None:
    step = PassRun(
        "canonicalize",
        True,
        {"prefill": {"a": 3, "b": 1, "same": 2}, "head": {"a": 1}},
        {"prefill": {"a": 1, "c": 4, "same": 2}, "head": {"a": 1}},
    )
    (row,) = pass_rows([step], [])
    (change,) = row.graphs
    assert (change.graph, change.before, change.after) == ("prefill", 6, 7)
    assert change.changes == (("a", -2), ("b", -1), ("c", 4))
    assert row.purpose.startswith("Canonicalize traced graphs")


def test_history_alone_has_no_counts() -> None:
    (row,) = pass_rows(None, ["fuse_kernels"])
    assert row.modified is None and row.graphs == () and row.purpose


def test_every_pass_says_what_it_is_for() -> None:
    assert all(text.endswith(".") and len(text) > 20 for text in pass_purposes().values())


def test_sites_that_are_the_same_in_two_graphs_share_a_row(plan: Plan) -> None:
    rows = site_rows(plan.sites)
    assert [(row.layer, row.part, row.graphs) for row in rows] == [
        (0, "kv_cache", "prefill"),
        (0, "mlp.up_proj", "decode, prefill"),
        (1, "mlp.up_proj", "decode, prefill"),
    ]
    (table,) = error_tables(rows)
    assert (table.stem, table.columns) == ("model.layers", ("mlp.up_proj",))
    assert table.rows == ((0, (0.01,)), (1, (0.02,)))


def test_kernels_are_counted_once_per_site(plan: Plan) -> None:
    rows = [(row.kernel, row.sites, row.graphs) for row in kernel_rows(plan.sites)]
    assert rows == [("op::a", 2, "decode, prefill"), ("op::kv", 1, "prefill")]


def test_left_out_keeps_its_reason(plan: Plan) -> None:
    (row,) = left_out_rows(plan.left_out)
    assert (row.name, row.graphs, row.reason) == ("model.proj", "decode, prefill", "on the <ignore> list")


def test_settings_in_words(plan: Plan) -> None:
    assert ("visual tokens", "quota, keep 30%") in settings(plan)
    assert settings(Plan(recipe=Recipe.load("none"))) == [
        ("quantization", "none"),
        ("visual tokens", "all visual tokens are kept"),
        ("numerics", "fast: sums in float32"),
        ("calibration", "no data"),
    ]
    weights = dict(settings(Plan(recipe=Recipe.load("w4a16"))))
    assert weights["weights"] == "4 bits per channel, gptq" and weights["activations"] == "left as they are"
