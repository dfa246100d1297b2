"""Only a whole model loads; what transformers would fill, drop or convert without an error is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TESTBED, Tensors, change_config, change_tensors, write_checkpoint

from qpcompile.capture.load import load_model, load_processor, read_config
from qpcompile.errors import ModelError

FAMILIES = (families.llava, families.qwen2_5_vl, families.gemma3, families.idefics3)
LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(source: Any) -> ModelError:
    """The error, which has what, where and what to do."""
    with pytest.raises(ModelError) as caught:
        load_model(source)
    error = caught.value
    assert error.what and error.where and error.do and len(str(error)) < 1500
    return error


# Sizes


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("text_config", "num_hidden_layers", 10**7),
        ("vision_config", "num_hidden_layers", 10**7),
        ("text_config", "hidden_size", 10**9),
        ("text_config", "vocab_size", 10**9),
        ("vision_config", "image_size", 10**6),
    ],
)
def test_config_of_a_far_larger_model_is_refused_at_once(folder: Path, part: str, setting: str, value: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, **{part: config[part] | {setting: value}})
    started = time.monotonic()
    assert f"{part}.{setting} is {value}" in refused(folder).what
    assert time.monotonic() - started < 5


# Tensors


def test_a_whole_checkpoint_loads_with_its_own_numbers(whole: Path) -> None:
    model, processor = load_model(whole)
    held = load_file(whole / "model.safetensors")
    assert torch.equal(model.state_dict()["model.language_model.layers.1.mlp.up_proj.weight"],
                       held[LAYER + "mlp.up_proj.weight"])  # fmt: skip
    assert type(processor).__name__ == "LlavaProcessor" and not model.training


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_families_come_back_as_they_were_saved(build: Callable[[], Any], tmp_path: Path) -> None:
    model, _ = build()
    model.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, processor="given")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_decoder_under_another_prefix(folder: Path) -> None:
    change_tensors(folder, lambda held: {name.replace("language_model.", "llm."): t for name, t in held.items()})
    error = refused(folder)
    assert (
        "tensors of the model are missing: 30 (lm_head.weight, model.language_model.embed_tokens.weight" in error.what
    )
    assert "tensors have no place in the model: 29 (llm.model.embed_tokens.weight" in error.what


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {name: tensor for name, tensor in held.items() if part not in name}


def test_missing_layer(folder: Path) -> None:
    change_tensors(folder, without(LAYER))
    assert refused(folder).what == (
        "the checkpoint does not hold this model: tensors of the model are missing: 9 "
        "(model.language_model.layers.1.input_layernorm.weight, model.language_model.layers.1.mlp.down_proj.weight, "
        "model.language_model.layers.1.mlp.gate_proj.weight, model.language_model.layers.1.mlp.up_proj.weight, ...)"
    )


def test_missing_head_of_a_model_that_does_not_share_it(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, tie_word_embeddings=False, text_config=text | {"tie_word_embeddings": False})
    assert "missing: 1 (lm_head.weight)" in refused(folder).what


def test_tensor_without_a_place(folder: Path) -> None:
    change_tensors(folder, lambda held: held | {"language_model.model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)})
    error = refused(folder)
    assert "have no place in the model: 1 (model.language_model.layers.3.mlp.up_proj.weight)" in error.what
    assert error.do and "pass the model itself" in error.do


def test_tensor_of_another_shape(folder: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    change_tensors(folder, lambda held: held | {name: held[name][:3].clone()})
    assert "up_proj.weight: [3, 32] in the file, [48, 32] in the model" in refused(folder).what


@pytest.mark.parametrize(
    "name", [LAYER + "self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids"]
)
def test_buffers_of_older_versions_are_no_defect(folder: Path, name: str) -> None:
    change_tensors(folder, lambda held: held | {name: torch.arange(4)})
    load_model(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(folder: Path, number: float) -> None:
    def spoil(held: Tensors) -> Tensors:
        held[LAYER + "mlp.up_proj.weight"][1, 2] = number
        return held

    change_tensors(folder, spoil)
    assert refused(folder).what == (
        "1 tensors of the model hold NaN or infinite numbers: model.language_model.layers.1.mlp.up_proj.weight"
    )


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "I32")]
)
def test_codes_are_not_taken_for_weights(folder: Path, dtype: torch.dtype, said: str) -> None:
    name = LAYER + "mlp.up_proj.weight"
    change_tensors(folder, lambda held: held | {name: held[name].to(dtype)})
    assert refused(folder).what == f"the checkpoint is quantized already: {name} is of {said}"


# Quantized checkpoints, adapters, compiled models


METHODS = [
    "awq",
    "bitsandbytes",
    "fp8",
    "auto-round",
    "hqq",
    "quark",
    "mxfp4",
    "modelopt",
]


@pytest.mark.parametrize("method", METHODS)
def test_quantized_checkpoints_are_refused_by_method(folder: Path, method: str) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    error = refused(folder)
    assert error.what == f"the checkpoint is quantized already ({method})"
    assert error.do and "full-precision" in error.do


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "(bitsandbytes)"),
        ({"quantization_config": {"bits": 4}}, "(unknown method)"),
        ({"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}}, "(awq)"),
    ],
)
def test_quantized_configurations_of_other_forms(folder: Path, settings: dict[str, Any], said: str) -> None:
    change_config(folder, **settings)
    with pytest.raises(ModelError, match="quantized already") as caught:
        read_config(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}', "(NVFP4)"),
        ("quantize_config.json", '{"quant_method": "gptq"}', "(gptq)"),
        ("quant_config.json", "{", "(quant_config.json)"),
        ("adapter_config.json", "{}", "an adapter is stored with the model"),
        ("manifest.json", "{}", "this is a compiled model already"),
    ],
)
def test_other_files_beside_a_model(folder: Path, name: str, text: str, said: str) -> None:
    (folder / name).write_text(text)
    assert said in refused(folder).what


def test_adapter_without_a_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    error = refused(folder)
    assert "an adapter without the model" in error.what and error.do and "merge_and_unload" in error.do


def test_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    assert "GGUF files (model-q4.gguf)" in refused(tmp_path).what


# Damaged files


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def link(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")

    return damage


def pipe(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut(WEIGHTS), "model.safetensors is damaged or cut short"),
        (write(WEIGHTS, b""), "model.safetensors is empty"),
        (write(WEIGHTS, b"\xff" * 100), "model.safetensors is damaged or cut short"),
        (write(WEIGHTS, POINTER), "model.safetensors is a pointer of git-lfs"),
        (link(WEIGHTS), "model.safetensors is not a file, or a link that leads nowhere"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
        (write("config.json", b"{"), "config.json is not JSON"),
        (write("config.json", b"[]"), "config.json holds no JSON object"),
        (write("config.json", b"[" * 100_000), "config.json is not JSON"),
        (write("config.json", b"\xff\xfe"), "config.json is not JSON"),
        (write("config.json", b"{}"), "config.json names no model_type"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (write("tokenizer.json", POINTER), "tokenizer.json is a pointer of git-lfs"),
        (write("tokenizer.json", b"{}"), "the processor of"),
        (pipe("tokenizer.json"), "tokenizer.json is not a file"),
        (
            write("tokenizer_config.json", b'{"fast_tokenizer_files": ["../elsewhere/tokenizer.4.0.0.json"]}'),
            "fast_tokenizer_files names '../elsewhere/tokenizer.4.0.0.json', which is outside the folder",
        ),
        (
            write("processor_config.json", b'{"audio_tokenizer": {"audio_tokenizer_name_or_path": "/elsewhere"}}'),
            "audio_tokenizer names another model",
        ),
        (lambda folder: (folder / "processor_config.json").unlink(), "the processor of"),
    ],
)
def test_damaged_files_are_named(folder: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    assert said.lower() in refused(folder).what.lower()


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights in two files; returns the index that was written."""
    held = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(held))}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in held.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"weight_map": {"a": "../outside.safetensors"}}, "'../outside.safetensors', which is outside the folder"),
        ({"weight_map": {"a": "model-00003.safetensors"}}, "model-00003.safetensors is missing"),
        ({"weight_map": {}}, "has no metadata or no table of files"),
        ({"weight_map": [1]}, "has no metadata or no table of files"),
    ],
)
def test_index_of_files(folder: Path, change: dict[str, Any], said: str | None) -> None:
    index = shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | change))
    if said is None:
        load_model(folder)
    else:
        assert said in refused(folder).what


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refused(folder).what.startswith("model-00002-of-00002.safetensors is missing")


def test_pickles_are_read_as_tensors_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    load_model(folder)
    torch.save({"a": print}, folder / "pytorch_model.bin")
    assert "a pickle with more than tensors in it, which is never run" in refused(folder).what


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(folder: Path) -> None:
    (folder / WEIGHTS).chmod(0)
    assert "cannot be read" in refused(folder).what


# Configurations and places


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "of_tomorrow", "transformers_version": "9.1.0"}, "and the checkpoint was saved by 9.1.0"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.C"}}, "code that comes with a checkpoint is never run"),
        ({"model_type": "llama"}, "does not answer questions about pictures"),
        ({"model_type": ["llava"]}, "does not load as an image-text-to-text model"),
        ({"text_config": 3}, "Validation error for field 'text_config'"),
        ({"dtype": "float99"}, "does not load as an image-text-to-text model"),
        ({"attn_implementation": "someone/kernels"}, "kernels of a hub, which are never run"),
    ],
)
def test_configurations_of_no_use(folder: Path, settings: dict[str, Any], said: str) -> None:
    change_config(folder, **settings)
    assert said in refused(folder).what


def test_code_beside_a_known_model_is_not_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    change_config(folder, auto_map={"AutoConfig": "code.C", "AutoModelForImageTextToText": "code.M"})
    assert type(load_model(folder)[0]).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nothing/here", "there is no folder ./nothing/here"),
        (Path("nothing"), "there is no folder nothing"),
        ("no\0name", "there is no folder"),
        ("n" * 5000, "cannot be read"),
        (str(TESTBED / WEIGHTS), "is a file, not a model's folder"),
        ("nobody/nothing", "no folder here is named nobody/nothing"),
    ],
)
def test_places_without_a_model(source: str | Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said in refused(source).what


def test_a_tokenizer_alone_is_no_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "processor_class": None}))
    change_config(folder, model_type="llama")
    with pytest.raises(ModelError, match="has no processor for pictures and text, only a") as caught:
        load_processor(folder)
    assert caught.value.do and "processor=" in caught.value.do


def test_an_interrupt_passes(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qpcompile.capture.load.mapped_model", stops)
    with pytest.raises(KeyboardInterrupt):
        load_model(whole)
