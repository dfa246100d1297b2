"""The checkpoint of the format compressed-tensors: the package reads it, and transformers answers with it as we do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from families import llava, paligemma
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

import qpcompile
from qpcompile.capture.chat import about_picture, chat_inputs
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.compressed.recipes import CLIPS, misfits, refuse_recipe
from qpcompile.errors import ExportError, KernelError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.kernels.quantize_dynamic.reference import code_range, dequantize, quantize_dynamic
from qpcompile.picture import read_picture
from qpcompile.quantization.words import pack_int32, unpack_int32
from qpcompile.recipe.recipe import Recipe, preset_names

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
DATA = TESTBED / "calibration" / "llava"
WEIGHTS = ["quantize.weights.solver=rtn", "quality.samples=0"]
CACHE = ["quantize.kv_cache.bits=16", "quantize.head_bits=16"]
# Inputs as the package itself rounds them.
INPUTS = [*CACHE, f"quantize.activations.clip_ratio={CLIPS[1]}"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "w4a16": ("w4a16", [*WEIGHTS, "quantize.weights.granularity=group", "quantize.weights.group_size=32"]),
    "w8a8": ("w8a8", [*WEIGHTS, *INPUTS]),
    "w4a8": ("w8a8", [*WEIGHTS, *INPUTS, "quantize.weights.bits=4"]),
}


def codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    low, high = code_range(bits)
    return torch.randint(
        low, high + 1, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 99))
def test_words_are_those_of_the_package(rows: int, columns: int, bits: int, seed: int) -> None:
    q = codes(rows, columns, bits, seed)
    words = pack_int32(q, bits)
    assert torch.equal(words, pack_to_int32(q, bits))
    assert torch.equal(unpack_from_int32(words, bits, q.shape), q)
    assert torch.equal(unpack_int32(words, bits, columns), q)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match="from -9 to 0 do not fit in 4 bits"):
        pack_int32(torch.tensor([[-9, 0]], dtype=torch.int8), 4)


def test_the_package_rounds_inputs_as_ours_with_its_clip_ratio() -> None:
    x = torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(0))
    how = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)  # type: ignore[call-arg]
    scale, zero = compute_dynamic_scales_and_zp(x, how, nn.Identity())
    q, own = quantize_dynamic(x, 0, CLIPS[1], 8)
    torch.testing.assert_close(own, scale, rtol=1e-6, atol=0)
    # The largest of a token is half-way between two codes: the last bit of the scale decides.
    inner = x.abs() < x.abs().amax(dim=-1, keepdim=True)
    ours, theirs = dequantize(q, own), fake_quantize(x, scale, zero, how)
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=1e-6, atol=0)
    assert (ours - theirs).abs().max() <= 1.001 * scale.max()


@pytest.mark.parametrize("preset", preset_names())
def test_a_refused_preset_is_accepted_with_what_the_error_says(preset: str) -> None:
    recipe = Recipe.load(preset)
    if preset == "w4a16":
        refuse_recipe(recipe)
        return
    with pytest.raises(ExportError) as caught:
        refuse_recipe(recipe)
    advice = str(caught.value.do)
    if recipe.quantize is None:
        assert "w4a16" in advice
        return
    nearest = recipe.with_overrides([word for word in advice.split() if "=" in word])
    refuse_recipe(nearest)
    assert nearest.quantize is not None
    assert nearest.quantize.weights == recipe.quantize.weights


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("quantize.activations={bits: 8, clip_ratio: 0.9}", "largest magnitude"),
        ("quantize.activations={bits: 8, granularity: group}", "per token"),
        ("quantize.scaling=awq", "awq scales the inputs"),
        ("quantize.center=0.1", "adds biases"),
        ("quantize.weights.bits=16", "no weights are quantized"),
    ],
)
def test_one_setting_is_refused_with_its_reason(setting: str, reason: str) -> None:
    more = ["quantize.activations.bits=16", "quantize.kv_cache.bits=8"] if setting.endswith("bits=16") else []
    recipe = Recipe.load("w4a16").with_overrides([setting, *more])
    assert recipe.quantize is not None
    assert any(reason in why for _, why in misfits(recipe, recipe.quantize))


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledVLM]:
    """Of the testbed, by kind; made when asked for."""
    return {}


def model_of(kind: str, compiled: dict[str, CompiledVLM]) -> CompiledVLM:
    if kind not in compiled:
        preset, overrides = KINDS[kind]
        compiled[kind] = qpcompile.compile(TESTBED / "llava", Recipe.load(preset).with_overrides(overrides))
    return compiled[kind]


def questions(model: CompiledVLM, count: int) -> dict[str, Any]:
    asked = read_data(DATA)[:count]
    return chat_inputs(
        model.processor,
        [about_picture(read_picture(each.picture), each.question) for each in asked],
        [each.where for each in asked],
    )


@pytest.mark.parametrize("kind", ["w4a16", *(pytest.param(each, marks=pytest.mark.slow) for each in ("w8a8", "w4a8"))])
def test_transformers_answers_with_the_folder_as_the_compiled_model(
    kind: str, compiled: dict[str, CompiledVLM], tmp_path: Path
) -> None:
    ours: Any = model_of(kind, compiled)
    ours.export_compressed_tensors(tmp_path / "out")
    auto: Any = AutoModelForImageTextToText
    theirs, told = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    inputs = questions(ours, 6)
    with torch.no_grad():
        expected, found = ours(**inputs).logits, theirs(**inputs).logits[:, -1:]
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    # Inputs of 8 bits: a sum in another order flips codes.
    assert (found - expected).norm() / spread < (1e-5 if kind == "w4a16" else 2e-2)
    asked = {**inputs, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(**asked), ours.generate(**asked))
    own = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(own) is type(ours.processor) and own.chat_template == ours.processor.chat_template


@pytest.mark.slow
def test_what_is_written_is_read_again_with_the_same_codes(compiled: dict[str, CompiledVLM], tmp_path: Path) -> None:
    ours = model_of("w4a16", compiled)
    ours.export_compressed_tensors(tmp_path / "out")
    again = qpcompile.compile(tmp_path / "out", ours.recipe)
    assert {site.codes for site in again.plan.sites} == {"kept"}
    inputs = questions(ours, 4)
    torch.testing.assert_close(again(**inputs).logits, ours(**inputs).logits, rtol=0, atol=0)


def test_what_is_written_is_codes(compiled: dict[str, CompiledVLM], tmp_path: Path) -> None:
    ours = model_of("w4a16", compiled)
    ours.save_pretrained(tmp_path / "artifact")
    ours.export_compressed_tensors(tmp_path / "one")
    qpcompile.load(tmp_path / "artifact").export_compressed_tensors(tmp_path / "two")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight_packed"].shape == (128, 40) and f"{name}.weight" not in tensors
    assert tensors[f"{name}.weight_scale"].shape == (128, 10)
    # README.md has a distance of logits, whose last bits depend on where tensors lie.
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"], group["input_activations"]) == ("pack-quantized", ["Linear"], None)
    assert {"lm_head", "language_model.lm_head", "vision_tower.encoder.layers.4.mlp.fc1"} <= set(config["ignore"])


@pytest.mark.slow
def test_linears_of_other_bits_are_a_group_by_name(tmp_path: Path, compiled: dict[str, CompiledVLM]) -> None:
    preset, overrides = KINDS["w4a16"]
    channel = [*overrides[:2], "quantize.mean_bits.weights=5", "quantize.scope=[language]", "calibration.samples=2"]
    ours = qpcompile.compile(TESTBED / "llava", Recipe.load(preset).with_overrides(channel), calibration=DATA)
    ours.export_compressed_tensors(tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    inputs = questions(ours, 2)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits[:, -1:], ours(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_that_was_cast_keeps_its_type(tmp_path: Path) -> None:
    model: Any
    model, cases = llava()
    inputs = {name: each.bfloat16() if each.is_floating_point() else each for name, each in cases["one"].items()}
    recipe = Recipe.load("w4a16").with_overrides([*WEIGHTS, "quantize.weights.bits=8"])
    ours = qpcompile.compile(model.to(torch.bfloat16), recipe, calibration=[inputs])
    ours.export_compressed_tensors(tmp_path / "out", check=inputs)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        expected, found = ours(**inputs).logits.float(), theirs(**inputs).logits[:, -1:].float()  # type: ignore[union-attr]
    assert (found - expected).norm() / (expected - expected.mean(dim=-1, keepdim=True)).norm() < 0.05


@pytest.mark.slow
def test_norms_that_add_one_and_towers_that_want_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cases = paligemma()
    recipe = Recipe.load("w4a16").with_overrides(WEIGHTS)
    ours = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    with caplog.at_level(logging.WARNING, logger="qpcompile"):
        ours.export_compressed_tensors(tmp_path / "out", check=cases["one"])
    assert "dequantize=True" in caplog.text and "SiglipVisionModel" in caplog.text
    assert "CompressedTensorsConfig(dequantize=True)" in (tmp_path / "out" / "README.md").read_text()
    whole = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", quantization_config=whole)
    with torch.no_grad():
        expected, found = ours(**cases["one"]).logits, theirs(**cases["one"]).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_that_would_answer_otherwise_is_not_written(
    compiled: dict[str, CompiledVLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = model_of("w4a16", compiled)
    # As if a pass had left something in the graphs that no weight holds.
    monkeypatch.setattr(CompiledVLM, "__call__", lambda self, **inputs: _shifted(self, inputs))
    with pytest.raises(ExportError, match="does not compute what the compiled model does"):
        ours.export_compressed_tensors(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _shifted(model: CompiledVLM, inputs: dict[str, Any]) -> Any:
    answer = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    answer["logits"] = answer.logits[0][:, None].roll(1, -1)
    return answer
