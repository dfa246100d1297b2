"""Checkpoints of integer codes: read as they are, kept where a recipe asks for the same grid, or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_checkpoint import Tensors, change_config, change_tensors, write_checkpoint

import qpcompile
from qpcompile.capture.load import load_model, read_config
from qpcompile.capture.quantized import grids
from qpcompile.errors import ModelError
from qpcompile.kernels.linear_int.packing import unpack_int4
from qpcompile.quantization.grids import CHANGED, Grid
from qpcompile.quantization.solver import expand
from qpcompile.recipe.quantize import WeightScheme
from qpcompile.recipe.recipe import Recipe

DECODER = "language_model.model.layers."
MODULES = "model.language_model.layers."
GROUP = 16
Scales = dict[str, tuple[torch.Tensor, torch.Tensor]]


def rounded(tensors: Tensors, bits: int, size: int) -> Scales:
    """Linear of the decoder -> codes i8[N, K], scale f32[N, G]; the scales are not those that a solver would find."""
    found: Scales = {}
    for name, weight in tensors.items():
        if name.startswith(DECODER) and weight.ndim == 2:
            groups = weight.float().unflatten(1, (-1, size or weight.shape[1]))
            scale = groups.abs().amax(dim=-1) * 0.83 / 2 ** (bits - 1)
            codes = (groups / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            found[name.removesuffix(".weight")] = codes.flatten(1).to(torch.int8), scale
    return found


def compressed(scales: Scales, bits: int, packed: bool) -> Tensors:
    made: Tensors = {}
    for name, (codes, scale) in scales.items():
        made[f"{name}.weight_scale"] = scale
        if packed:
            made |= {
                f"{name}.weight_packed": pack_to_int32(codes, bits),
                f"{name}.weight_shape": torch.tensor(codes.shape),
            }
        else:
            made[f"{name}.weight"] = codes
    return made


def gptq(scales: Scales) -> Tensors:
    made: Tensors = {}
    for name, (codes, scale) in scales.items():
        columns, groups = codes.shape[1], scale.shape[1]
        made[f"{name}.qweight"] = pack_to_int32(codes, 4).T.contiguous()
        made[f"{name}.scales"] = scale.T.contiguous()
        made[f"{name}.qzeros"] = torch.full((groups, len(codes) // 8), 0x77777777, dtype=torch.int32)
        made[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    return made


def settings(kind: str, bits: int, size: int) -> dict[str, Any]:
    if kind == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True, "desc_act": False}
    how = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if size else "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**how, "group_size": size or None}}}
    form = "pack-quantized" if kind == "packed" else "int-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def write(folder: Path, kind: str, bits: int = 4, size: int = GROUP) -> Scales:
    """A quantized checkpoint; its codes and scales."""
    write_checkpoint(folder)
    scales = rounded(load_file(folder / "model.safetensors"), bits, size)
    new = gptq(scales) if kind == "gptq" else compressed(scales, bits, kind == "packed")
    gone = {f"{name}.weight" for name in scales}
    change_tensors(folder, lambda held: {name: each for name, each in held.items() if name not in gone} | new)
    change_config(folder, quantization_config=settings(kind, bits, size))
    return scales


def module(name: str) -> str:
    return name.replace(DECODER, MODULES)


@pytest.mark.parametrize(
    "kind, bits, size", [("packed", 4, GROUP), ("packed", 8, 0), ("plain", 8, 0), ("gptq", 4, GROUP)]
)
def test_weights_are_codes_times_scales(kind: str, bits: int, size: int, tmp_path: Path) -> None:
    scales = write(tmp_path / "in", kind, bits, size)
    (tmp_path / "in" / "quantize_config.json").write_text('{"quant_method": "gptq"}')  # GPTQ's tools leave it
    model, processor = load_model(tmp_path / "in")
    assert processor is not None and getattr(model.config, "quantization_config", None) is None
    found = grids(tmp_path / "in", model)
    assert found.keys() == {module(name) for name in scales}
    for name, (codes, scale) in scales.items():
        weight: Any = model.get_submodule(module(name)).weight
        assert torch.equal(weight, codes * expand(scale, codes.shape[1]))
        assert found[module(name)].bits == bits and torch.equal(found[module(name)].scale, scale)
        assert torch.equal(found[module(name)].codes(weight), codes)  # type: ignore[arg-type]


def recipe(*overrides: str) -> Recipe:
    plain = ["quantize.weights.solver=rtn", "quantize.scope=[language]", "quality.samples=0"]
    return Recipe.load("w4a16").with_overrides([*plain, *overrides])


def grouped(size: int) -> list[str]:
    return ["quantize.weights.granularity=group", f"quantize.weights.group_size={size}"]


def test_codes_are_kept_where_the_recipe_asks_for_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scales = write(tmp_path / "in", "gptq")
    with caplog.at_level(logging.WARNING, logger="qpcompile"):
        compiled = qpcompile.compile(tmp_path / "in", recipe(*grouped(GROUP)))
    assert "linears keep the codes of the checkpoint" in caplog.text and "rounded again" not in caplog.text
    assert {site.codes for site in compiled.plan.sites} == {"kept"}
    assert "kept by 21 of 21 linears" in repr(compiled)
    prefill = compiled.program.graphs["prefill"].module
    for name, (codes, scale) in scales.items():
        own = prefill.get_submodule(module(name).removeprefix("model.language_model."))
        assert torch.equal(unpack_int4(own.weight_packed, codes.shape[1]), codes)  # type: ignore[arg-type]
        assert torch.equal(own.weight_scale, scale)  # type: ignore[arg-type]


@pytest.mark.slow
def test_other_grids_are_rounded_again_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in", "packed")
    with caplog.at_level(logging.WARNING, logger="qpcompile"):
        compiled = qpcompile.compile(tmp_path / "in", recipe())
    reason = "the checkpoint has groups of 16, the recipe one scale per channel"
    assert f"0 linears keep the codes of the checkpoint; 21 were rounded again: {reason}" in caplog.text
    assert {site.codes for site in compiled.plan.sites} == {reason}


@given(st.sampled_from([4, 8]), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99))
def test_codes_of_a_grid_survive_rounding_to_the_models_type(bits: int, dtype: torch.dtype, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 8), dtype=torch.int8, generator=made)
    scale = torch.rand(3, 2, generator=made) + 0.01
    grid = Grid(scale, bits)
    weight = (codes * expand(scale, 8)).to(dtype)
    assert torch.equal(grid.codes(weight), codes)  # type: ignore[arg-type]
    if dtype == torch.float32:
        assert grid.codes(weight * 1.001) is None  # near miss: a basis that changed a little


def test_bits_of_the_grid_are_compared() -> None:
    grid, weight = Grid(torch.ones(2, 1), 8), torch.ones(2, 32)
    assert grid.mismatch(weight, WeightScheme(bits=4)) == "the checkpoint has 8 bits, the recipe 4"
    assert not grid.mismatch(weight, WeightScheme(bits=8))
    assert CHANGED


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {name: each for name, each in held.items() if name != f"{DECODER}0.mlp.up_proj.{part}"}


def replaced(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    name = f"{DECODER}0.mlp.up_proj.{part}"
    return lambda held: held | {name: change(held[name]) if name in held else change(torch.zeros(2))}


@pytest.mark.parametrize(
    "kind, damage, said",
    [
        ("gptq", without("scales"), "up_proj has no scales"),
        ("gptq", replaced("weight", lambda each: each.to(torch.int8)), "up_proj.weight is of I8"),
        ("gptq", replaced("g_idx", lambda each: each.flip(0)), "act-order"),
        ("gptq", replaced("qzeros", lambda each: each + 1), "zero points"),
        ("gptq", replaced("scales", lambda each: each[:, :-1].contiguous()), "contradict"),
        ("gptq", replaced("weight", lambda each: each), "has a weight beside its codes"),
        ("packed", without("weight_shape"), "has no weight_shape"),
        ("packed", replaced("weight_zero_point", lambda each: each), "weight_zero_point belongs to a variety"),
        ("packed", replaced("weight_g_idx", lambda each: each), "weight_g_idx belongs to a variety"),
        ("packed", replaced("weight_scale", lambda each: each[:-1].contiguous()), "the scales of"),
        ("packed", replaced("weight_shape", lambda each: each + 1), "not packed as its shape says"),
    ],
)
def test_files_of_other_varieties_are_refused(
    kind: str, damage: Callable[[Tensors], Tensors], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "in", kind)
    change_tensors(tmp_path / "in", damage)
    refuses(tmp_path / "in", said)


@pytest.mark.parametrize(
    "kind, change, said",
    [
        ("gptq", {"desc_act": True}, r"act-order \(desc_act\)"),
        ("gptq", {"sym": False}, "zero points"),
        ("gptq", {"bits": 8}, "weights of 8 bits are not read"),
        ("gptq", {"checkpoint_format": "marlin"}, "layout marlin"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "zero points"),
        ("packed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read"),
        ("packed", {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}}, "type float"),
        ("packed", {"config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}}, "num_bits 2"),
        ("packed", {"quant_method": "gptq", "bits": 4}, "says gptq, and no weight in the files is stored so"),
        ("packed", {"quant_method": "awq"}, r"quantized already \(awq\)"),
    ],
)
def test_settings_of_other_varieties_are_refused(kind: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path / "in", kind)
    change_config(tmp_path / "in", quantization_config=settings(kind, 4, GROUP) | change)
    refuses(tmp_path / "in", said)


def test_a_configuration_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", "packed")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    change_config(tmp_path / "in", text_config=config["text_config"] | {"vocab_size": 10**6})
    with pytest.raises(ModelError, match="vocab_size is 1000000"):
        load_model(tmp_path / "in")


def refuses(folder: Path, said: str) -> None:
    with pytest.raises(ModelError, match="quantized already") as caught:
        load_model(folder)
    assert caught.match(said)
    assert caught.value.do and "full-precision" in caught.value.do


def test_a_name_on_the_hub_is_to_be_downloaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedConfig

    told = {"model_type": "llava", "quantization_config": {"quant_method": "gptq"}}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_: (told, {}))
    monkeypatch.setattr("qpcompile.capture.load.find_adapter_config_file", lambda *_: None)
    with pytest.raises(ModelError, match="read from a folder only") as caught:
        read_config("org/model")
    assert caught.value.do and "hf download org/model" in caught.value.do
