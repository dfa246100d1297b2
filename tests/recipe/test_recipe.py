"""A recipe is read in full or refused in full, and round-trips."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.errors import RecipeError
from qpcompile.recipe.quantize import matches_name
from qpcompile.recipe.recipe import Recipe, preset_names

PRESETS = [
    *("joint-12.5", "joint-30", "joint-30-w4a8", "none", "prune-30", "qapruner-12.5", "quota-30", "quota-30-w4a8"),
    *("quota-50", "w4a16", "w4a4kv4", "w4a4kv4-mixed", "w4a8kv4", "w8a8"),
]

WEIGHTS = st.fixed_dictionaries(
    {},
    optional={
        "granularity": st.sampled_from(["channel", "group"]),
        "solver": st.sampled_from(["gptq", "rtn"]),
        "damping": st.floats(1e-6, 1),
        "clip_search": st.booleans(),
    },
)
ACTIVATIONS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([4, 8, 16]),
        "granularity": st.sampled_from(["token", "group"]),
        "clip_ratio": st.floats(0.01, 1),
    },
)
QUANTIZE = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "weights": WEIGHTS,
        "activations": ACTIVATIONS,
        "kv_cache": st.fixed_dictionaries({}, optional={"bits": st.sampled_from([4, 16]), "rotate": st.booleans()}),
        "transform": st.sampled_from(["none", "hadamard"]),
        "smooth": st.none() | st.floats(0.01, 0.99),
        "scope": st.lists(st.sampled_from(["vision", "projector", "language"]), min_size=1, unique=True),
        "ignore": st.lists(st.sampled_from(["lm_head", "re:.*patch_embed", "a.b", "yes", "1"])),
    },
)
TOKENS = st.fixed_dictionaries(
    {"method": st.sampled_from(["random", "quota"])},
    optional={
        "keep": st.floats(1e-6, 1),
        "candidate_layers": st.just("auto") | st.sets(st.integers(0, 40), min_size=1).map(sorted),
        "temperature": st.floats(1e-3, 1e3),
        "eta": st.floats(1e-30, 1),
        "weights": st.fixed_dictionaries({"inter": st.floats(1e-5, 1e5)}),
        "normalize": st.sampled_from(["percentile", "mad", "rank"]),
        "intra_mean": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    },
)
RECIPES = st.fixed_dictionaries({}, optional={"quantize": QUANTIZE, "tokens": TOKENS})


def refused(text: str) -> str:
    """The error message for a recipe text."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    return str(caught.value)


def sections(data: Mapping[str, Any], at: str = "") -> list[str]:
    """Paths of all sections in a full recipe, the root's is empty."""
    inner = [sections(value, f"{at}{key}.") for key, value in data.items() if isinstance(value, dict)]
    return [at, *(path for paths in inner for path in paths)]


# Keys of `tokens.options` are the method's (tests/pruning/test_table.py).
SECTIONS = [each for each in sections(Recipe.load("quota-30").to_dict()) if each != "tokens.options."]


@settings(max_examples=30)
@given(RECIPES)
def test_round_trip(data: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(data)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
    assert hash(recipe) == hash(Recipe.from_yaml(recipe.to_yaml()))


@settings(max_examples=30)
@given(st.sampled_from(SECTIONS), st.from_regex(r"[a-z_]{1,12}x[0-9]", fullmatch=True))
def test_unknown_key_is_refused_with_its_path(section: str, key: str) -> None:
    data = Recipe.load("quota-30").to_dict()
    inner = data
    for part in section.split(".")[:-1]:
        inner = inner[part]
    inner[key] = 1
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    assert f"\n  {section}{key}: unknown key" in str(caught.value)


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_anything_in_place_of_a_section_is_a_recipe_or_our_error(value: Any) -> None:
    for key in ("version", "quantize", "tokens", "calibration"):
        try:
            Recipe.from_dict({key: value})
        except RecipeError as error:
            assert f"  {key}" in str(error)


def test_presets_load_and_round_trip() -> None:
    assert preset_names() == PRESETS
    for name in PRESETS:
        recipe = Recipe.load(name)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_presets_say_what_their_names_say() -> None:
    assert Recipe.load("none") == Recipe()
    for name, keep in (("prune-30", 0.3), ("quota-30", 0.3), ("quota-50", 0.5)):
        tokens = Recipe.load(name).tokens
        assert (tokens.method, tokens.keep) == ("quota", keep)
    full = Recipe.load("w4a4kv4").quantize
    assert full and (full.weights.bits, full.activations.bits, full.kv_cache.bits) == (4, 4, 4)
    assert full.head_bits == 8
    assert (full.transform, full.smooth, full.weights.solver) == ("flatquant", 0.5, "gptq")
    assert Recipe.load("quota-30").quantize == Recipe.load("quota-50").quantize == full
    qapruner = Recipe.load("qapruner-12.5")
    assert (qapruner.tokens.method, qapruner.tokens.keep, qapruner.quantize) == ("qapruner", 0.125, full)
    weights_only = Recipe.load("w4a16").quantize
    assert weights_only and (weights_only.activations.bits, weights_only.kv_cache.bits) == (16, 16)
    assert weights_only.weights.kernel_group == 0 and weights_only.head_bits == 16
    assert Recipe.load("prune-30").quantize is None
    eight = Recipe.load("w4a8kv4").quantize
    assert eight and (eight.weights.bits, eight.activations.bits, eight.kv_cache.bits) == (4, 8, 4)
    assert (eight.transform, eight.smooth, eight.weights.solver) == ("hadamard", 0.5, "gptq")
    for method in ("quota", "joint"):
        pruned = Recipe.load(f"{method}-30-w4a8")
        assert pruned.quantize == eight and pruned.tokens == Recipe.load(f"{method}-30").tokens
    wide = Recipe.load("w8a8").quantize
    assert wide and (wide.weights.bits, wide.activations.bits, wide.kv_cache.bits) == (8, 8, 8)


def test_load_takes_a_recipe_and_a_path(tmp_path: Path) -> None:
    recipe = Recipe.load("quota-50")
    assert Recipe.load(recipe) is recipe
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe


def test_load_names_presets_and_close_matches(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean quota-30") as caught:
        Recipe.load("qouta-30")
    assert "w4a4kv4" in str(caught.value)
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            Recipe.load(path)
        assert caught.value.where == str(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "binary.yaml")


def test_all_wrong_keys_are_listed_at_once() -> None:
    assert refused(
        "version: 2\n"
        "quantise: {}\n"
        "tokens: {keeep: 0.5, keep: 0, method: fastvv, candidate_layers: [3, 2], percentiles: [1], seed: true}\n"
        "calibration: null\n"
    ) == (
        "the recipe has 9 keys that cannot be used:\n"
        "  version: given 2; allowed: 1\n"
        '  tokens.method: given "fastvv"; allowed: none | cdpruner | dart | divprune | fastv | joint | prumerge_plus '
        "| pyramiddrop | qapruner | quota | random | random_input | sparsevlm | trim | visionzip | vtw\n"
        "  tokens.keep: given 0; allowed: number >= 1e-06 and <= 1\n"
        "  tokens.candidate_layers: given [3, 2]; allowed: auto | list of integer >= 0 and < 10000 "
        "(layers must be strictly increasing)\n"
        "  tokens.percentiles: given [1]; allowed: [number, number]\n"
        "  tokens.seed: given true; allowed: integer >= 0 and <= 9223372036854775807\n"
        "  tokens.keeep: unknown key; did you mean keep or keep_of?\n"
        "  calibration: given null; allowed: a section with the keys samples, seed, after_cuts\n"
        "  quantise: unknown key; did you mean quantize?\n"
        "  where: recipe text\n"
        "  what to do: correct the keys above; the recipe reference in the documentation lists every key"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens: {method: quota, keep: 1.01}", "tokens.keep: given 1.01; allowed: number >= 1e-06 and <= 1"),
        ("tokens: {method: quota, keep: .nan}", "tokens.keep: given NaN"),
        ("tokens: {keep: '0.5'}", 'tokens.keep: given "0.5"'),
        ("tokens: {candidate_layers: []}", "tokens.candidate_layers: given []"),
        (
            "tokens: {candidate_layers: [-1]}",
            "tokens.candidate_layers: given [-1]; allowed: auto | list of integer >= 0",
        ),
        ("tokens: {candidate_layers: [1, 1]}", "layers must be strictly increasing"),
        ("tokens: {candidate_layers: all}", 'tokens.candidate_layers: given "all"; allowed: auto | list'),
        ("tokens: {percentiles: [99, 1]}", "tokens.percentiles: given [99, 1]; allowed: [number, number] (needs 0 <="),
        ("tokens: {sensitivity_clip: [0.1, 1.1]}", "needs 0 <= low < high <= 1"),
        ("quantize: {weights: {bits: 3}}", "quantize.weights.bits: given 3; allowed: 4 | 8 | 16"),
        ("quantize: {head_bits: 4}", "quantize.head_bits: given 4; allowed: 8 | 16"),
        ("quantize: {smooth: 1.0}", "quantize.smooth: given 1.0; allowed: number > 0 and < 1 | null"),
        ("quantize: {scope: []}", "quantize.scope: given []"),
        ("quantize: {scope: [visoin]}", 'quantize.scope.0: given "visoin"; allowed: vision | projector | language'),
        ("quantize: {scope: [vision, vision]}", "a component is listed twice"),
        ("quantize: {ignore: lm_head}", 'quantize.ignore: given "lm_head"; allowed: list of string'),
        ("quantize: {ignore: ['re:(']}", "'re:(' is not a regular expression"),
        ("quantize: {ignore: ['re:']}", "an empty pattern"),
        ("quantize: {ignore: ['re:(a+)+$']}", "more than 4 repeats, or a repeated group"),
        ("quantize: {ignore: ['re:.*.*.*.*.*x']}", "more than 4 repeats, or a repeated group"),
        ("quantize: 4", "quantize: given 4; allowed: a section with the keys weights, activations, kv_cache"),
        ("1: 2", "1: a key must be text"),
        ("tokens: {keep: 1.0, keep: 0.5}", "not valid YAML: line 1, column 21: key 'keep' twice"),
        ("tokens: {keep", "not valid YAML"),
        ("tokens: !!python/object:os.system {}", "not valid YAML"),
        ("- 1", "a mapping of keys is needed at the top, got list"),
        ("", "a mapping of keys is needed at the top, got NoneType"),
    ],
)
def test_bad_value_is_refused_with_what_is_allowed(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("quantize.training.learning_rate=1e300", "number >= 1e-12 and <= 1"),
        ("quantize.weights.group_size=65537", "integer >= 1 and <= 65536"),
        ("quantize.weights.damping=1e-300", "number >= 1e-09 and <= 1"),
        ("quantize.activations.clip_ratio=1e-300", "number >= 0.01 and <= 1"),
        ("quantize.ignore=['" + "x" * 501 + "']", "string of at most 500 characters"),
        (f"quantize.ignore=[{', '.join(['x'] * 1001)}]", "list of string of at most 500 characters, 1000 at most"),
        ("tokens.multiple_of=1000000000000000000000000000000", "integer >= 1 and <= 65536"),
        ("tokens.seed=9223372036854775808", "integer >= 0 and <= 9223372036854775807"),
        ("tokens.candidate_layers=[1, 10000]", "integer >= 0 and < 10000"),
        ("tokens.weights.inter=1e308", "number >= 0 and <= 1e+06"),
        ("tokens.temperature=1e-300", "number >= 0.001 and <= 1000"),
        ("tokens.keep=1e-300", "number >= 1e-06 and <= 1"),
        ("tokens.keep=1e400", "number >= 1e-06 and <= 1"),
        ("calibration.samples=1000001", "integer >= 1 and <= 1000000"),
    ],
)
def test_numbers_beyond_any_use_are_refused(setting: str, allowed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("quota-30").with_overrides([setting])
    assert f"{setting.partition('=')[0]}" in caught.value.what and allowed in caught.value.what
    assert caught.value.where and caught.value.do


def test_sources_that_are_no_recipe(tmp_path: Path) -> None:
    for source in (3, None, {"version": 1}, "", ".", "nul\0", "n" * 5000, tmp_path / ("n" * 300), "quota_30.yaml"):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(source)  # pyright: ignore[reportArgumentType]
        error = caught.value
        assert error.what and error.where and error.do and len(str(error)) < 1000
    assert "did you mean quota-30" in str(caught.value)
    with pytest.raises(RecipeError, match="a mapping is needed, got list"):
        Recipe.from_dict([1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens: {keep: 0.5}", "tokens.keep: given 0.5: method is none, which keeps every token"),
        (
            "tokens: {weights: {inter: 0, magnitude: 0, intra: 0, residual: 0}}",
            "tokens.weights.inter: given 0: all four",
        ),
        (
            "tokens: {weights: {inter: 1e-9, magnitude: 0, intra: 0, residual: 0}}",
            "tokens.weights.inter: given 1e-09: all four weights are below 1e-06",
        ),
        ("quantize: {weights: {bits: 16}, transform: none}", "quantize.activations.bits: not given: codes multiply"),
        ("quantize: {weights: {bits: 8}}", "quantize.activations.bits: not given: with 8-bit weights"),
        (
            "quantize: {weights: {bits: 8, granularity: group}, activations: {bits: 16}}",
            'quantize.weights.granularity: given "group": 8-bit weights have one',
        ),
        ("quantize: {weights: {bits: 16}, activations: {bits: 16}}", "quantize.transform: not given: it serves"),
        (
            "quantize: {weights: {bits: 16}, activations: {bits: 16}, smooth: 0.5}",
            "quantize.smooth: given 0.5: it serves",
        ),
        ("quantize: {weights: {symmetric: false}}", "quantize.weights.symmetric: given false: no linear kernel"),
        (
            "quantize: {activations: {symmetric: false}}",
            "quantize.activations.symmetric: given false: no linear kernel",
        ),
        ("quantize: {kv_cache: {symmetric: true}}", "quantize.kv_cache.symmetric: given true: the cache kernels"),
        (
            "quantize: {weights: {bits: 16}, activations: {bits: 16}, kv_cache: {bits: 16}}",
            "quantize.weights.bits: given 16: nothing is quantized; write `quantize: null`",
        ),
        (
            "quantize: {head_bits: 8, scope: [vision, projector]}",
            "quantize.head_bits: given 8: the head belongs to language, which is not in scope; write 16",
        ),
        (
            "quantize: {weights: {granularity: group}, activations: {granularity: group, group_size: 64}}",
            "quantize.activations.group_size: given 64: must equal weights.group_size (128)",
        ),
    ],
)
def test_impossible_combination_is_refused_with_the_reason(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "tokens: {method: none, keep: 1.0}",
        "tokens: {method: quota, keep: 1}",
        "quantize: {activations: {granularity: group, group_size: 16}}",
        "quantize: {weights: {granularity: group, group_size: 16}}",
        "quantize: {weights: {granularity: group}, activations: {granularity: group}}",
        "quantize: {activations: {bits: 8}}",
        "quantize: {weights: {bits: 8, granularity: group}, activations: {bits: 8, granularity: group}}",
        "quantize: {weights: {bits: 8}, activations: {bits: 16}}",
        "quantize: {weights: {bits: 16}, activations: {bits: 16}, transform: none}",
        "quantize: {weights: {bits: 16}, activations: {bits: 16}, kv_cache: {bits: 16}, transform: none, head_bits: 8}",
        "tokens: {eta: 1e-6}",
        "quantize: {ignore: ['re:.*layers[.](0|1)[.][a-z]+[.]w{2}.*', 're:a(b)?']}",
    ],
)
def test_unusual_but_possible_combination_is_taken(text: str) -> None:
    Recipe.from_yaml(text)


def test_construction_in_python_is_checked_the_same_way() -> None:
    with pytest.raises(RecipeError, match=r"tokens\.keep: given 3"):
        Recipe(tokens={"method": "quota", "keep": 3})  # pyright: ignore[reportArgumentType]


def test_overrides_are_applied_together_and_checked_together() -> None:
    recipe = Recipe.load("none").with_overrides(
        ["tokens.keep=0.5", "tokens.method=quota", "tokens.candidate_layers=[2, 3]"]
    )
    assert (recipe.tokens.keep, recipe.tokens.candidate_layers) == (0.5, (2, 3))
    assert Recipe.load("none").with_overrides([]) == Recipe()
    assert Recipe.load("quota-30").with_overrides(["quantize=null"]).quantize is None
    quantize = Recipe.load("none").with_overrides(["quantize.weights.solver=rtn"]).quantize
    assert quantize and (quantize.weights.solver, quantize.weights.bits) == ("rtn", 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokens.kep=0.5", "tokens.kep: unknown key; did you mean keep or keep_of?\n  where: overrides tokens.kep=0.5"),
        ("tokens.keep", "has no key or no value"),
        ("=3", "has no key or no value"),
        ("tokens..keep=3", "has no key or no value"),
        ("tokens.keep.low=3", "goes below tokens.keep, which is a value, not a section"),
        ("tokens.keep=[1", "not valid YAML"),
        ("tokens.keep=2", "tokens.keep: given 2"),
    ],
)
def test_bad_override_is_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("quota-30").with_overrides([override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.my_lm_head", False),
        ("layers.1", "model.layers.11", False),
        ("re:.*patch_embed", "visual.patch_embed.proj", True),
        ("re:patch_embed", "visual.patch_embed", False),
    ],
)
def test_ignore_patterns(pattern: str, name: str, matches: bool) -> None:
    assert matches_name(pattern, name) is matches


def test_every_key_has_a_description() -> None:
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        assert [key for key, node in section["properties"].items() if not node.get("description")] == []


def test_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().version = 1  # pyright: ignore[reportAttributeAccessIssue]
