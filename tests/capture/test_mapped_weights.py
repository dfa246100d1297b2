"""A model whose weights stay in its files is the one that transformers loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_checkpoint import change_config, change_tensors, tiny_model, write_checkpoint
from transformers import AutoModelForImageTextToText

from qpcompile.capture import mapped_weights
from qpcompile.capture.load import load_model

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also tied ones."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def places(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses of all tensors that are mapped from now on."""
    found: set[int] = set()
    original = mapped_weights.mapped_file

    def noting(path: Path) -> dict[str, torch.Tensor]:
        read = original(path)
        found.update(tensor.data_ptr() for tensor in read.values())
        return read

    monkeypatch.setattr(mapped_weights, "mapped_file", noting)
    return found


@pytest.mark.parametrize("shift", range(8))
def test_tensors_that_a_file_does_not_align_are_copied(tmp_path: Path, shift: int) -> None:
    wanted = {"wide": torch.randn(5), "narrow": torch.randn(3).bfloat16()}
    raw = save({name: wanted[name] for name in ("wide", "narrow")})
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size] + b" " * shift
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    found = mapped_weights.mapped_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma"])
def test_it_is_what_transformers_loads(name: str) -> None:
    given, _ = load_model(TESTBEDS / name)
    wanted: Any = AutoModelForImageTextToText.from_pretrained(TESTBEDS / name)
    assert type(given) is type(wanted) and given.dtype == wanted.dtype and not given.training
    assert given.config.to_dict() == wanted.config.to_dict() and given.name_or_path == wanted.name_or_path
    assert given.generation_config.to_dict() == wanted.generation_config.to_dict()
    found, expected = tensors(given), tensors(wanted)
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    same = {key for key in expected if expected[key].data_ptr() == expected[next(iter(expected))].data_ptr()}
    assert same == {key for key in found if found[key].data_ptr() == found[next(iter(found))].data_ptr()}


def test_weights_of_several_files_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    mapped = places(monkeypatch)
    with caplog.at_level(logging.INFO, "qpcompile"):
        model, _ = load_model(folder)
    assert {parameter.data_ptr() for parameter in model.parameters()} <= mapped
    assert f"stay in {folder} and are read by the block" in caplog.text and "converted" not in caplog.text


def test_a_weight_of_another_type_is_converted_in_memory_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    change_tensors(folder, lambda held: {name: tensor.half() for name, tensor in held.items()})
    mapped = places(monkeypatch)
    with caplog.at_level(logging.INFO, "qpcompile"):
        model, _ = load_model(folder)
    assert not {parameter.data_ptr() for parameter in model.parameters()} & mapped
    assert "MB were converted in memory" in caplog.text
    stored = load_file(folder / "model.safetensors")
    assert model.dtype == torch.float32 and len(stored) > 20


def test_generation_settings_come_from_the_config_where_they_have_no_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=17)
    given, _ = load_model(folder)
    wanted: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert given.generation_config.to_dict() == wanted.generation_config.to_dict()
