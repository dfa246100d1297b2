"""A plan has equal text for equal decisions, and an inconsistent plan is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.recipe.plan import CalibrationUsed, Cut, Layer, LayerFacts, LeftOut, Plan, Sensitivity, Site
from qpcompile.recipe.recipe import Recipe

RATIOS = {2: (0.909, 9090), 3: (0.765, 7650), 4: (0.623, 6230), 5: (0.475, 4750), 6: (0.3, 3000)}


def example(**changes: Any) -> Plan:
    """A plan of eight layers with the cuts of figure 4 of the paper, roughly; lists given in reverse."""
    parts: dict[str, Any] = {
        "recipe": Recipe.load("quota-30"),
        "layers": [Layer(index=i, name=f"model.layers.{i}") for i in reversed(range(8))],
        "candidate_layers": [2, 3, 4, 5, 6],
        "facts": [LayerFacts(layer=i, mass_median=0.1 * i, mass_iqr=1e-7, cosine=1 / 3) for i in reversed(range(8))],
        "sensitivity": [Sensitivity(layer=i, raw=1 / i, normalized=0.5) for i in reversed(RATIOS)],
        "cuts": [Cut(layer=i, ratio=r, numerator=n, denominator=10_000) for i, (r, n) in reversed(RATIOS.items())],
        "sites": [
            Site(
                graph="prefill",
                name="model.layers.0.mlp.up_proj",
                weight_bits=4,
                activation_bits=4,
                kernel="w4a4 (cpu)",
            ),
            Site(graph="decode", name="model.layers.0.self_attn", cache_bits=4, error=0.01, kernel="kv4 (cpu)"),
        ],
        "left_out": [LeftOut(graph="head", name="lm_head", reason="ignored by the recipe: lm_head")],
        "calibration": CalibrationUsed(samples=128, sha256="0" * 64),
        "versions": {"transformers": "5.23.0", "torch": "2.13.0"},
    }
    return Plan(**(parts | changes))


def test_order_given_does_not_matter() -> None:
    plan = example()
    ordered = example(
        layers=plan.layers,
        cuts=plan.cuts,
        sites=plan.sites,
        facts=plan.facts,
        sensitivity=plan.sensitivity,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )
    assert plan == ordered and plan.to_yaml() == ordered.to_yaml()
    assert [cut.layer for cut in plan.cuts] == [2, 3, 4, 5, 6]
    assert [site.graph for site in plan.sites] == ["decode", "prefill"]


def test_round_trip() -> None:
    plan = example()
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.from_yaml(plan.to_yaml()).to_yaml() == plan.to_yaml()


@settings(max_examples=15)
@given(st.floats(0, 1e300), st.floats(0, 1))
def test_floats_come_back_bit_for_bit(raw: float, normalized: float) -> None:
    plan = example(sensitivity=[Sensitivity(layer=2, raw=raw, normalized=normalized)])
    assert Plan.from_yaml(plan.to_yaml()).sensitivity == plan.sensitivity


def test_numpy_floats_are_stored_as_plain_ones() -> None:
    plan = example(sensitivity=[Sensitivity(layer=2, raw=np.float64(0.1), normalized=0.5)])
    assert "- {layer: 2, raw: 0.1, normalized: 0.5}" in plan.to_yaml()


def test_text_is_as_written_here() -> None:
    plan = Plan(
        recipe=Recipe(),
        layers=(Layer(index=0, name="layers.0"),),
        cuts=(Cut(layer=0, ratio=0.3, numerator=3000, denominator=10_000),),
        sites=(Site(graph="prefill", name="fc", weight_bits=4, activation_bits=16, error=1e-7, kernel="w4a16 (cpu)"),),
    )
    _, marker, rest = plan.to_yaml().partition("layers:\n")
    assert marker + rest == (
        "layers:\n"
        "- {index: 0, name: layers.0}\n"
        "candidate_layers: []\n"
        "waived: []\n"
        "facts: []\n"
        "sensitivity: []\n"
        "cuts:\n"
        "- {layer: 0, ratio: 0.3, numerator: 3000, denominator: 10000, score: null, states: null}\n"
        "choice: null\n"
        "sites:\n"
        "- {graph: prefill, name: fc, weight_bits: 4, activation_bits: 16, cache_bits: null, error: 1.0e-07, "
        "kernel: w4a16 (cpu), codes: null,\n"
        "  unseen_experts: null}\n"
        "bits: []\n"
        "key_centers: []\n"
        "left_out: []\n"
        "trained: []\n"
        "calibration: {samples: 0, sha256: null}\n"
        "quality: null\n"
        "versions: {}\n"
    )


def test_visual_tokens_per_layer() -> None:
    assert example().visual_tokens(576) == (576, 576, 576, 524, 441, 359, 274, 173)
    assert example(cuts=[]).visual_tokens(576) == (576,) * 8


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_kept_is_the_ceiling(numerator: int, visual: int) -> None:
    kept = Cut(layer=0, ratio=numerator / 10_000, numerator=numerator, denominator=10_000).kept(visual)
    assert 1 <= kept <= visual
    assert (kept - 1) * 10_000 < visual * numerator <= kept * 10_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [Layer(index=1, name="x")]}, "layers: given .*: indices must be 0, 1, 2"),
        ({"candidate_layers": [3, 2]}, "candidate_layers: given .*: must be strictly increasing"),
        ({"candidate_layers": [8]}, "candidate_layers: given .*: layer 8 does not exist: the decoder has 8 layers"),
        ({"candidate_layers": [-1]}, "layer -1 does not exist"),
        ({"cuts": [Cut(layer=9, ratio=0.5, numerator=1, denominator=2)]}, "cuts: given .*: layer 9 does not exist"),
        (
            {"cuts": [Cut(layer=1, ratio=0.5, numerator=1, denominator=2)] * 2},
            "cuts: given .*: a layer is listed twice",
        ),
        (
            {"cuts": [Cut(layer=i, ratio=r, numerator=n, denominator=4) for i, r, n in [(1, 0.5, 2), (2, 0.75, 3)]]},
            "a later cut keeps more tokens",
        ),
        ({"cuts": [Cut(layer=1, ratio=1.0, numerator=3, denominator=2)]}, "a fraction is above 1"),
        (
            {"cuts": [Cut(layer=1, ratio=0.9, numerator=50, denominator=100)]},
            "numerator / denominator is not the ratio",
        ),
        ({"left_out": [LeftOut(graph="decode", name="model.layers.0.self_attn", reason="x")]}, "sites: .*listed twice"),
        ({"calibration": {"samples": 1, "sha256": "abc"}}, "calibration.sha256: given"),
        ({"facts": [{"layer": 1}]}, r"facts\.0\.mass_median: not given; allowed: number"),
        ({"versoins": {}}, "versoins: unknown key; did you mean versions?"),
        ({"version": 2}, "version: given 2; allowed: 1"),
    ],
)
def test_contradiction_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        example(**changes)


@pytest.mark.parametrize("text", ["recipe: {tokens: {keep: 0}}", "{}", "recipe: {}\nrecipe: {}", "[]"])
def test_bad_stored_plan_names_its_file(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml(text, where="out/plan.yaml")
    assert caught.value.where == "out/plan.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "anchors and aliases"),
        ("[" * 3000, "levels of nesting"),
        ("- 1", "a mapping of keys is needed"),
        ("recipe: {tokens: {keep: 3}}", "tokens.keep: given 3"),
        ("recipe: {}\nversion: 2", "version: given 2"),
        ("recipe: {}\nlayers: [{index: 1, name: a}]", "indices must be 0, 1, 2"),
        ("a: 1\n" * 300_000, "characters; 1048576 are read at most"),
    ],
)
def test_texts_that_are_no_plan_are_refused_in_full(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml(text, where="plan.yaml")
    error = caught.value
    assert said in error.what and error.where == "plan.yaml" and error.do and len(str(error)) < 1500
