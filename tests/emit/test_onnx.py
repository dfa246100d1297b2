"""The ONNX folder answers as the compiled module does, on onnxruntime and numpy alone; 4-bit weights take 4 bits."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir
import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.runner import OnnxVLM, Steps, text_positions
from qpcompile.errors import ExportError, OutputError
from qpcompile.files import sha256
from qpcompile.ir.names import names
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, Program
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine
from tests.families import llava, qwen2_5_vl

Cases = dict[str, dict[str, torch.Tensor]]
TAKES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
NEW_TOKENS = 8
CUTS = "tokens.candidate_layers=[0,1]"
# With float64 sums onnxruntime gives the module's tokens, not only most of them.
EXACT = "numerics=exact"


def arrays(case: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs of a prompt that the runner takes."""
    return {name: tensor.numpy() for name, tensor in case.items() if name in TAKES}


def compiled(program: Program, cases: Cases, preset: str, *overrides: str) -> Program:
    """A copy of a captured program, compiled with a preset."""
    recipe = Recipe.load(preset).with_overrides(overrides)
    program = copy.deepcopy(program)
    layers = program.layers
    program.recipe, program.plan = recipe, Plan(recipe=recipe, layers=layers)
    samples = [cases["one"], cases["longer"]]
    run_passes(program, passes(samples, len(samples)))
    return program


def check_same_tokens(program: Program, folder: Path, cases: Cases) -> None:
    """Greedy tokens of the runner equal those of the program, for every prompt."""
    machine, runner = Machine(program), OnnxVLM(folder, threads=1)
    for name, case in cases.items():
        expected = machine.generate(**case, max_new_tokens=NEW_TOKENS, do_sample=False)
        found = runner.generate(**arrays(case), max_new_tokens=NEW_TOKENS)
        assert found.tolist() == expected.tolist(), name


def initializer_bytes(folder: Path, name: str) -> Counter[str]:
    """Stored bytes of a graph's tensors by type, those in the data file."""
    found: Counter[str] = Counter()
    for tensor in onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.initializer:
        length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
        found[onnx.TensorProto.DataType.Name(tensor.data_type)] += length
    return found


def operators(folder: Path, name: str) -> Counter[str]:
    """How often each operator occurs in a graph, its functions in place."""
    return Counter(node.op_type for node in in_place(folder / f"{name}.onnx").graph.node)


def in_place(path: Path) -> onnx.ModelProto:
    """A graph with its functions in place of their calls."""
    return onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))


@pytest.fixture(scope="module")
def quota(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Path]:
    """The same model with two cuts, 4-bit weights, activations and cache."""
    program = compiled(compiled_llava.program, tiny_llava[1], "quota-30", CUTS, EXACT)
    folder = tmp_path_factory.mktemp("onnx") / "quota"
    export_onnx(program, folder)
    return program, folder


@pytest.fixture(scope="module")
def qwen() -> tuple[Program, Cases]:
    """A random Qwen2.5-VL, captured."""
    model, cases = qwen2_5_vl()
    return capture(model, cases["one"], Recipe.load("none")), cases


def test_tokens_and_logits_are_the_models(tiny_llava: tuple[Any, Cases], plain: Path) -> None:
    model, cases = tiny_llava
    runner = OnnxVLM(plain, threads=1)
    for name, case in cases.items():
        expected = model.generate(
            **case, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        given = arrays(case)
        assert runner.generate(**given, max_new_tokens=3).tolist() == expected.sequences.tolist(), name
        ids, mask = given["input_ids"], given["attention_mask"]
        steps = Steps(runner, mask, np.where(mask == 0, 0, np.cumsum(mask, 1) - 1))
        logits = [steps.prefill(ids, runner.encode(given["pixel_values"]))]
        logits += [steps.decode(expected.sequences[:, ids.shape[1] + step, None].numpy()) for step in range(2)]
        for found, wanted in zip(logits, expected.logits, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_a_prompt_without_a_picture(tiny_llava: tuple[Any, Cases], plain: Path) -> None:
    model, cases = tiny_llava
    ids = cases["longer"]["input_ids"][:, -15:]
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert OnnxVLM(plain, threads=1).generate(ids.numpy(), max_new_tokens=5).tolist() == expected.tolist()


def test_rows_that_ended_are_padded(tiny_llava: tuple[Any, Cases], plain: Path, tmp_path: Path) -> None:
    model, cases = tiny_llava
    case = cases["padded"]
    free = model.generate(**case, max_new_tokens=6, do_sample=False)[:, case["input_ids"].shape[1] :]
    end = int(free[0, 2])
    expected = model.generate(**case, max_new_tokens=6, do_sample=False, eos_token_id=end)
    runner = OnnxVLM(plain, threads=1)
    runner.generation["eos_token_id"] = end
    assert runner.generate(**arrays(case), max_new_tokens=6).tolist() == expected.tolist()


def test_cut_and_quantized_tokens_are_the_compiled_modules(
    quota: tuple[Program, Path], tiny_llava: tuple[Any, Cases]
) -> None:
    check_same_tokens(*quota, tiny_llava[1])


def test_cut_graphs_rank_and_gather_and_keep_four_bits(quota: tuple[Program, Path], plain: Path) -> None:
    program, folder = quota
    found = operators(folder, "prefill")
    assert found["TopK"] - operators(plain, "prefill")["TopK"] >= 2 * len(program.plan.cuts)
    assert found["GatherElements"] > operators(plain, "prefill")["GatherElements"]
    codes = sum(
        tensor.numel() for name, tensor in program.graphs[PREFILL].module.named_buffers() if tensor.dtype == torch.uint8
    )
    stored = {name: initializer_bytes(folder, name)["INT4"] for name in ("prefill", "decode")}
    assert stored["prefill"] == stored["decode"]
    # Small tensors are in the graph's own file.
    assert 0.5 * codes < stored["prefill"] <= codes


def test_no_cast_gives_the_type_it_was_given(quota: tuple[Program, Path]) -> None:
    for path in sorted(quota[1].glob("*.onnx")):
        model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(in_place(path)))
        casts = [node for node in model.graph if node.op_type == "Cast"]
        assert casts, path.name  # codes are cast to integers
        types = {node.name: [value and value.dtype for value in (*node.inputs, *node.outputs)] for node in casts}
        assert {name: each for name, each in types.items() if each[0] == each[1]} == {}
        assert not any(node.op_type == "Identity" for node in model.graph)


def test_nodes_are_named_after_the_modules_they_come_from(quota: tuple[Program, Path]) -> None:
    _, folder = quota
    nodes = onnx.load(folder / "prefill.onnx", load_external_data=False).graph.node
    products = [node.name for node in nodes if node.op_type.startswith("linear_int")]
    assert products and all(re.fullmatch(r"layers\.\d\.\w+\.\w+_proj/linear_int_default\w*", name) for name in products)
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize(
    "preset", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "w4a16")), "quota-30"]
)
def test_pictures_of_any_size(qwen: tuple[Program, Cases], preset: str, tmp_path: Path) -> None:
    program, cases = qwen
    program = compiled(program, cases, preset, EXACT, *([CUTS] if preset == "quota-30" else []))
    export_onnx(program, tmp_path / "folder")
    check_same_tokens(program, tmp_path / "folder", cases)


def test_weights_of_both_decoder_graphs_are_stored_once(plain: Path) -> None:
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in ("prefill", "decode"):
        model = onnx.load(plain / f"{name}.onnx", load_external_data=False)
        places[name] = {tuple(entry.value for entry in t.external_data) for t in model.graph.initializer} - {()}
    assert places["prefill"] == places["decode"]


def test_sizes_that_vary_have_names(plain: Path) -> None:
    session = OnnxVLM(plain, threads=1)
    shapes = {entry.name: entry.shape for entry in (*session.prefill.get_inputs(), *session.decode.get_outputs())}
    assert shapes["input_ids"] == ["batch", "tokens"]
    assert shapes["image_features"][0] == "visual_tokens"
    assert shapes["logits"] == ["batch", 99]
    assert shapes["present.1.key"] == ["batch", 2, "tokens_so_far", 12]


def test_folder_stands_alone(tiny_llava: tuple[Any, Cases], compiled_llava: CompiledVLM, plain: Path) -> None:
    """The runner in the folder, in a process where only numpy and onnxruntime can be imported."""
    case = tiny_llava[1]["padded"]
    given: dict[str, Any] = {**arrays(case)}
    np.savez(plain.parent / "inputs.npz", **given)
    blocker = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "qpcompile", "onnx", "onnxscript", "onnx_ir", "safetensors"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
sys.argv = ["runner.py", ".", "../inputs.npz", "--max-new-tokens", "5", "--threads", "1"]
runpy.run_path("runner.py", run_name="__main__")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", blocker], cwd=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = compiled_llava.generate(**case, max_new_tokens=5, do_sample=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == expected[:, case["input_ids"].shape[1] :].tolist()


def test_manifest_names_every_file(plain: Path) -> None:
    manifest = json.loads((plain / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in plain.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (plain / name).stat().st_size, "sha256": sha256(plain / name)}
    assert {"vision.onnx", "prefill.onnx", "decode.onnx", "runner.py", "plan.yaml", "recipe.yaml"} <= set(
        manifest["files"]
    )


def test_same_program_same_bytes(compiled_llava: CompiledVLM, plain: Path, tmp_path: Path) -> None:
    export_onnx(compiled_llava.program, tmp_path / "again")
    for path in plain.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_wrong_number_of_pictures_is_refused(tiny_llava: tuple[Any, Cases], plain: Path) -> None:
    given: dict[str, Any] = arrays(tiny_llava[1]["padded"])
    with pytest.raises(RunnerError, match=r"has 32 image tokens .* the pictures give 16"):
        OnnxVLM(plain, threads=1).generate(**given | {"pixel_values": given["pixel_values"][:1]})


def test_existing_folder_is_refused(compiled_llava: CompiledVLM, plain: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        export_onnx(compiled_llava.program, plain)


def test_inputs_nobody_can_compute_are_refused(compiled_llava: CompiledVLM, tmp_path: Path) -> None:
    program = copy.deepcopy(compiled_llava.program)
    graph = program.graphs[PREFILL]
    graph.inputs = names("pixel_mask" if name == "position_ids" else name for name in graph.inputs)
    with pytest.raises(ExportError, match=r"inputs that the ONNX runner cannot compute: pixel_mask"):
        export_onnx(program, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_operator_without_translation_is_named(compiled_llava: CompiledVLM, tmp_path: Path) -> None:
    program = copy.deepcopy(compiled_llava.program)
    graph = program.graphs[PREFILL].module.graph
    node = next(node for node in graph.nodes if node.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.erfinv.default
    with pytest.raises(ExportError, match=r"aten.erfinv.default has no translation to ONNX\n  where: prefill, silu"):
        export_onnx(program, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_host_that_wants_more_than_pixels_is_refused(
    compiled_llava: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_image_features(self: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> None: ...

    monkeypatch.setattr(type(compiled_llava.program.host), "get_image_features", get_image_features)
    with pytest.raises(ExportError, match="takes pictures into its tower cannot be traced") as caught:
        export_onnx(compiled_llava.program, tmp_path / "folder")
    assert caught.value.where == "vision"
    assert not list(tmp_path.iterdir())


def test_host_that_changes_features_is_refused(
    compiled_llava: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any operation after the projector other than splitting by picture would be missing in the graph."""
    kind: Any = type(compiled_llava.program.host)
    original = kind.get_image_features

    def doubled(self: Any, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [2 * part for part in original(self, pixel_values).pooler_output]

    monkeypatch.setattr(kind, "get_image_features", doubled)
    with pytest.raises(ExportError, match="what LlavaForConditionalGeneration does with pictures"):
        export_onnx(compiled_llava.program, tmp_path / "folder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision_is_written_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, cases = llava()
    captured = capture(model.to(dtype), cases["one"], Recipe.load("none"))  # type: ignore[arg-type]
    program = compiled(captured, cases, "w4a4kv4", "quantize.transform=hadamard", CUTS)
    export_onnx(program, tmp_path / "folder")
    for name in ("vision", "prefill", "decode"):
        graph = onnx.load(tmp_path / "folder" / f"{name}.onnx", load_external_data=False).graph
        types = {tensor.data_type for tensor in graph.initializer} | {
            value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)
        }
        assert not types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}, name
    runner = OnnxVLM(tmp_path / "folder", threads=1)
    for case in cases.values():
        inputs = arrays({key: each.float() if each.is_floating_point() else each for key, each in case.items()})
        assert runner.generate(**inputs, max_new_tokens=4).shape[1] == case["input_ids"].shape[1] + 4


@pytest.mark.slow
def test_unquantized_bfloat16_answers_as_the_module(tmp_path: Path) -> None:
    model, cases = llava()
    program = capture(model.bfloat16(), cases["one"], Recipe.load("none"))
    export_onnx(program, tmp_path / "folder")
    machine, runner = Machine(program), OnnxVLM(tmp_path / "folder", threads=1)
    for name, case in cases.items():
        made = machine.generate(
            **case, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        given = arrays(case)
        steps = Steps(runner, given["attention_mask"], text_positions(given["attention_mask"]))
        found = steps.prefill(given["input_ids"], runner.encode(given.get("pixel_values")))
        logits = made.logits[0].float().numpy()
        # What the module rounds to 8 bits at every step stays float32 here.
        assert np.abs(found - logits).max() < 0.05 * np.abs(logits).max(), name


def test_missing_extra_is_named(compiled_llava: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qpcompile.emit.onnx.export", None)
    with pytest.raises(ExportError, match=r"qpcompile\[onnx\]"):
        compiled_llava.export_onnx(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_check_says_that_answers_are_the_same(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], tmp_path: Path
) -> None:
    compiled_llava.export_onnx(tmp_path / "folder", check=[tiny_llava[1]["one"], tiny_llava[1]["padded"]])
    found = json.loads((tmp_path / "folder" / "check.json").read_text())
    assert found == {"numerics": "fast", "answers": 3, "alike": 3, "different": [], "why": ""}
    assert "check.json" in json.loads((tmp_path / "folder" / "manifest.json").read_text())["files"]


FLOAT = onnx.TensorProto.FLOAT
HEAD_ALONE = "{weights: {bits: 16}, activations: {bits: 16}, kv_cache: {bits: 16}, transform: none, head_bits: 8}"


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_a_table_that_shares_the_heads_8_bits(tmp_path: Path, fast: bool) -> None:
    model, cases = llava(tie_word_embeddings=True, head_dim=16)
    program = capture(model, cases["one"], Recipe.load("none").with_overrides([f"quantize={HEAD_ALONE}"]))
    run_passes(program, passes([], 0))
    export_onnx(program, tmp_path / "folder", fast=fast)
    for name in ("prefill", "decode"):
        tensors = onnx.load(tmp_path / "folder" / f"{name}.onnx", load_external_data=False).graph.initializer
        assert not [each.name for each in tensors if sorted(each.dims) == [48, 99] and each.data_type == FLOAT]
        tables = [each for each in tensors if sorted(each.dims) == [48, 99]]
        assert len({tuple(entry.value for entry in each.external_data) for each in tables}) == 1
        assert len(tables) == (1 if fast else 2), "what is looked up and, where it is exact, what is multiplied"
    if not fast:
        check_same_tokens(program, tmp_path / "folder", cases)
