"""`export_onnx(fast=True)`: onnxruntime's own operators on the same stored weights, and how results change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.fast.graphs import AS_MODULE, CHANGES, in_blocks, linear_w8, quantize_w8
from qpcompile.emit.onnx.runner.runner import IN_PLACE, ROOM, OnnxVLM, Steps
from qpcompile.errors import ExportError
from qpcompile.ir.program import Program
from qpcompile.kernels.linear_w8a16.reference import linear_w8a16, quantize_rows
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine
from tests.emit.test_onnx import CUTS, Cases, arrays, compiled, in_place, operators
from tests.families import llava

WIDE_HEADS = {"head_dim": 16}


def asked(runner: OnnxVLM, case: dict[str, torch.Tensor], answer: torch.Tensor) -> list[Any]:
    """Logits after the prompt and after each token but the last of a given answer, i64[B, T]."""
    given = arrays(case)
    ids, mask = given["input_ids"], given["attention_mask"]
    steps = Steps(runner, mask, runner._positions(ids == runner.image_token, mask, None, []))
    logits = [steps.prefill(ids, runner.encode(given.get("pixel_values")))]
    return logits + [steps.decode(answer[:, at, None].numpy()) for at in range(answer.shape[1] - 1)]


@pytest.fixture(scope="module")
def captured() -> tuple[Any, Program, Cases]:
    """A random LLaVA with heads of 16."""
    model, cases = llava(**WIDE_HEADS)
    return model, capture(model, cases["one"], Recipe.load("none")), cases


@pytest.fixture(scope="module")
def plain(captured: tuple[Any, Program, Cases], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing quantized, nothing cut."""
    folder = tmp_path_factory.mktemp("fast") / "plain"
    export_onnx(captured[1], folder, fast=True)
    return folder


@pytest.fixture(scope="module")
def quota(
    captured: tuple[Any, Program, Cases], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, dict[str, Path]]:
    """Two cuts, 4-bit weights, activations and cache; the exact folder and the fast one."""
    program = compiled(captured[1], captured[2], "quota-30", CUTS, "quantize.transform=hadamard", "numerics=exact")
    folders = {name: tmp_path_factory.mktemp("fast") / name for name in ("exact", "fast")}
    for name, folder in folders.items():
        export_onnx(program, folder, fast=name == "fast")
    return program, folders


def test_without_quantization_only_the_order_of_sums_differs(captured: tuple[Any, Program, Cases], plain: Path) -> None:
    model, _, cases = captured
    runner = OnnxVLM(plain, threads=1)
    for name, case in cases.items():
        options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        made = model.generate(**case, max_new_tokens=4, **options)
        answer = made.sequences[:, case["input_ids"].shape[1] :]
        for found, wanted in zip(asked(runner, case, answer), made.logits, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5, err_msg=name)


def test_answers_longer_than_the_room_behind_the_cache(captured: tuple[Any, Program, Cases], plain: Path) -> None:
    model, _, cases = captured
    case = cases["padded"]
    expected = model.generate(**case, max_new_tokens=ROOM + 6, do_sample=False)
    assert OnnxVLM(plain, threads=1).generate(**arrays(case), max_new_tokens=ROOM + 6).tolist() == expected.tolist()


def test_a_prompt_without_a_picture(captured: tuple[Any, Program, Cases], plain: Path) -> None:
    model, _, cases = captured
    ids = cases["longer"]["input_ids"][:, -15:]
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert OnnxVLM(plain, threads=1).generate(ids.numpy(), max_new_tokens=5).tolist() == expected.tolist()


WEIGHTS = {
    "4 bits": ("quantize.activations.bits=16",),
    "8 bits": ("quantize.weights.bits=8", "quantize.activations.bits=8"),
    "8 bits, grouped": (
        *("quantize.weights.bits=8", "quantize.activations.bits=8", "quantize.weights.granularity=group"),
        "quantize.weights.group_size=16",
    ),
    "8 bits, float inputs": ("quantize.weights.bits=8", "quantize.activations.bits=16"),
}


@pytest.mark.parametrize(
    "weights", ["4 bits", "8 bits", *(pytest.param(each, marks=pytest.mark.slow) for each in list(WEIGHTS)[2:])]
)
def test_eight_bits_lose_little_of_what_the_weights_say(
    captured: tuple[Any, Program, Cases], weights: str, tmp_path: Path
) -> None:
    """Against the module with the same weights and at least 8 bits elsewhere: activations, head and cache differ."""
    _, program, cases = captured
    overrides = (*WEIGHTS[weights], "quantize.kv_cache.bits=8", "quantize.transform=none")
    program = compiled(program, cases, "w4a4kv4", "quantize.smooth=null", "quantize.center=null", *overrides)
    export_onnx(program, tmp_path / "fast", fast=True)
    machine, runner = Machine(program), OnnxVLM(tmp_path / "fast", threads=1)
    for name, case in cases.items():
        options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        made = machine.generate(**case, max_new_tokens=5, **options)
        answer = made.sequences[:, case["input_ids"].shape[1] :]
        for found, wanted in zip(asked(runner, case, answer), made.logits, strict=True):
            error = np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy())
            assert error < 0.03, (name, error)


def test_cut_and_quantized_prompts_are_answered(quota: tuple[Program, dict[str, Path]], captured: Any) -> None:
    program, folders = quota
    runner = OnnxVLM(folders["fast"], threads=1)
    machine = Machine(program)
    for name, case in captured[2].items():
        made = machine.generate(
            **case, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        answer = made.sequences[:, case["input_ids"].shape[1] :]
        for found, wanted in zip(asked(runner, case, answer), made.logits, strict=True):
            likeness = np.corrcoef(found.ravel(), wanted.numpy().ravel())[0, 1]
            assert likeness > 0.9, (name, likeness)


@pytest.mark.slow
def test_half_precision_with_shifts_in_front_of_codes(tmp_path: Path) -> None:
    # The centre that is subtracted from activations is float32 and would promote types through the graph.
    model, cases = llava(**WIDE_HEADS)
    captured = capture(model.bfloat16(), cases["one"], Recipe.load("none"))
    program = compiled(captured, cases, "w4a4kv4", "quantize.transform=hadamard", "quantize.center=0.001")
    export_onnx(program, tmp_path / "fast", fast=True)
    machine, runner = Machine(program), OnnxVLM(tmp_path / "fast", threads=1)
    made = machine.generate(
        **cases["one"], max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    (found,) = asked(runner, cases["one"], made.sequences[:, -1:])
    # The module's 4-bit activations are 8-bit ones here.
    expected = made.logits[0].float().numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def test_a_tower_without_a_mask_has_the_operator_that_takes_none(plain: Path) -> None:
    towers = operators(plain, "vision")
    assert towers["MultiHeadAttention"] == 1 and not towers["GroupQueryAttention"] and not towers["Softmax"]


def test_operators_are_onnxruntimes_and_nothing_is_copied_or_wide(quota: tuple[Program, dict[str, Path]]) -> None:
    _, folders = quota
    decode, prefill = (operators(folders["fast"], name) for name in ("decode", "prefill"))
    assert decode["GroupQueryAttention"] == prefill["GroupQueryAttention"] == 3
    assert decode["MatMulNBits"] == 3 * 4 + 1 and not decode["MatMulInteger"]
    assert prefill["MatMulIntegerToFloat"] == 3 * 4 and prefill["MatMulNBits"] == 1
    assert prefill["QuantizeLinear"] == 3 * 4
    graph = in_place(folders["fast"] / "decode.onnx").graph
    sizes = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    assert sizes["past_key_values.0.key"].elem_type == onnx.TensorProto.INT8
    assert [each.dim_value for each in sizes["past_key_values.0.key.scale"].shape.dim] == [2, 1, 16]
    joined = {name for node in graph.node if node.op_type == "Concat" for name in node.input}
    assert not any(name.startswith("past_key_values") for name in joined)
    casts = [each.i for node in graph.node if node.op_type == "Cast" for each in node.attribute if each.name == "to"]
    assert onnx.TensorProto.DOUBLE not in casts


def test_one_copy_of_the_weights_serves_both_products(quota: tuple[Program, dict[str, Path]]) -> None:
    _, folders = quota
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in ("prefill", "decode"):
        tensors = onnx.load(folders["fast"] / f"{name}.onnx", load_external_data=False).graph.initializer
        packed = [each for each in tensors if "weight_packed" in each.name]
        places[name] = {tuple(entry.value for entry in each.external_data) for each in packed} - {()}
    assert places["prefill"] == places["decode"] != set()


def test_the_folder_says_what_its_numbers_are(quota: tuple[Program, dict[str, Path]]) -> None:
    _, folders = quota
    said = {name: json.loads((folder / "manifest.json").read_text())["numbers"] for name, folder in folders.items()}
    assert said == {"exact": list(AS_MODULE["exact"]), "fast": list(CHANGES)}
    models = {name: onnx.load(folder / "decode.onnx", load_external_data=False) for name, folder in folders.items()}
    marked = {name: [entry.key for entry in model.metadata_props] for name, model in models.items()}
    assert marked == {"exact": [], "fast": [IN_PLACE]}


def test_same_program_same_bytes(captured: tuple[Any, Program, Cases], plain: Path, tmp_path: Path) -> None:
    export_onnx(captured[1], tmp_path / "again", fast=True)
    for path in plain.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_heads_that_onnxruntime_does_not_take_are_refused(compiled_llava: CompiledVLM, tmp_path: Path) -> None:
    """Heads of 12: the exact export writes them (test_onnx.py), the fast one says why not."""
    with pytest.raises(ExportError, match="one width that 8 divides") as caught:
        export_onnx(compiled_llava.program, tmp_path / "folder", fast=True)
    assert "fast=True" in str(caught.value.where)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [1, 128, 200])
def test_codes_of_the_module_in_blocks(width: int) -> None:
    x, weight = torch.randn(3, width), torch.randn(5, width)
    rows = quantize_rows(weight)
    codes, scale = in_blocks(*rows)
    assert codes.dtype == torch.uint8 and codes.shape[2] == 128
    torch.testing.assert_close(linear_w8(x, codes, scale, None), linear_w8a16(x, *rows, None))


def test_the_head_in_8_bits() -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    weight[3, :128] = 0
    codes, scale = quantize_w8(weight)
    assert codes.shape == (5, 2, 128) and scale.shape == (5, 2)
    back = ((codes.float() - 128) * scale[..., None]).flatten(1)
    assert torch.equal(back[:, 200:], torch.zeros(5, 56)) and torch.equal(back[3, :128], torch.zeros(128))
    assert float((back[:, :200] - weight).abs().max()) <= float(scale.max()) / 2 + 1e-6
