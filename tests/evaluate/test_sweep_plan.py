"""A plan becomes rows: every combination once, methods as recipes, seeds where they matter; errors are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpcompile.errors import RecipeError
from qpcompile.evaluate.report.kept_figure import token_grid
from qpcompile.evaluate.search import LADDER
from qpcompile.evaluate.sweep.plan import BASE, SweepPlan, cells
from qpcompile.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
version: 1
beds: [{name: one, model: m, data: d, calibration: c}]
seeds: [0, 1]
samples: 8
shares: [0.5, 0.25]
reference: quota
quantizers: {fp16: {seeds: [0]}, low: {recipe: w4a4kv4}}
pruners: {none: {}, quota: {set: [tokens.method=quota]}}
ablations: {score: {quantizer: low, pruner: quota, share: 0.5, variants: {rank: [tokens.normalize=rank]}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "plan.yaml"
    made.write_text(TEXT)
    return made


def test_rows_of_a_plan(path: Path) -> None:
    found = list(cells(SweepPlan.load(path)))
    assert found[0].recipe is None
    places = [(c.quantizer, c.pruner, c.share, c.seed, c.variant) for c in found[1:]]
    both = [("none", 1.0), ("quota", 0.5), ("quota", 0.25)]
    expected = [("fp16", pruner, share, 0, None) for pruner, share in both]
    for seed in (0, 1):
        expected += [("low", pruner, share, seed, None) for pruner, share in both]
        expected += [("low", "quota", 0.5, seed, variant) for variant in (BASE, "rank")]
    assert places == expected


def test_a_recipe_takes_its_parts(path: Path) -> None:
    cell = next(c for c in cells(SweepPlan.load(path)) if (c.seed, c.variant) == (1, "rank"))
    assert cell.recipe is not None
    assert cell.recipe.quantize == Recipe.load("w4a4kv4").quantize
    tokens, drawn = cell.recipe.tokens, cell.recipe.calibration
    assert (tokens.method, tokens.keep, tokens.keep_of, tokens.normalize) == ("quota", 0.5, "mean", "rank")
    assert (drawn.samples, drawn.seed, tokens.seed) == (8, 1, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("quantizer: low", "quantizer: lower", "ablations.score.quantizer"),
        ("pruner: quota", "pruner: quote", "ablations.score.pruner"),
        ("reference: quota", "reference: joint", "reference"),
        ("shares: [0.5, 0.25]", "shares: [0]", "shares"),
        ("seeds: [0, 1]\n", "seed: 1\n", "seed"),
    ],
)
def test_mistakes_are_named(path: Path, old: str, new: str, words: str) -> None:
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(RecipeError, match=words):
        SweepPlan.load(path)


@pytest.mark.parametrize("plan", sorted((ROOT / "docs" / "results").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_results(plan: Path) -> None:
    found = SweepPlan.load(plan)
    assert {cell.bed.name for cell in cells(found)} == {bed.name for bed in found.beds}
    # Every cut is compared with none and with random tokens; a plan of bits alone cuts nothing.
    assert "none" in found.pruners and (len(found.pruners) == 1 or "random" in found.pruners)


@pytest.mark.parametrize("bits", LADDER)
def test_every_rung_is_a_recipe(bits: str) -> None:
    recipe = Recipe.load("quota-30").with_overrides(LADDER[bits])
    assert (recipe.quantize is None) == (bits == "16 bit")


@pytest.mark.parametrize(
    ("width", "height", "count", "grid"),
    [(96, 96, 144, (12, 12)), (128, 96, 192, (12, 16)), (96, 112, 168, (14, 12)), (96, 96, 97, None)],
)
def test_grid_of_tokens(width: int, height: int, count: int, grid: tuple[int, int] | None) -> None:
    assert token_grid(width, height, count) == grid


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: &a [*a]", "anchors and aliases"),
        (b"\xff\xfe", "the plan cannot be read: byte 0 is not UTF-8 text"),
        (b"#" * 70_000, "the plan has more than 65536 bytes"),
        (b"beds: 3", "the plan has keys that cannot be used"),
        (TEXT.replace("[0, 1]", "[9223372036854775808]").encode(), "seeds.0: given 9223372036854775808"),
    ],
)
def test_files_that_are_no_plan_are_refused_in_full(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "plan.yaml").write_bytes(content)
    for source, words in ((tmp_path / "plan.yaml", said), (tmp_path, "the plan cannot be read")):
        with pytest.raises(RecipeError) as caught:
            SweepPlan.load(source)
        assert words in caught.value.what and caught.value.where and caught.value.do
