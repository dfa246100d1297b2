"""Settings of generation_config.json in the runner: honoured as transformers does, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.runner.choice import HONOURED, NOTHING, OF_CHANCE, WITHOUT_EFFECT, Choice, unserved
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.errors import ExportError
from qpcompile.runtime import generation_options

Tiny = tuple[Any, dict[str, dict[str, torch.Tensor]]]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"suppress_tokens": [62, 16], "begin_suppress_tokens": [9, 66]},
        {"eos_token_id": [62, 16, 66]},
        {"eos_token_id": [62, 16, 66], "min_new_tokens": 4},
        {"eos_token_id": 62, "min_length": 34},
        {"do_sample": True, "top_k": 1},
        {"top_p": 0.5, "typical_p": 0.2, "top_k": 3},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_honoured_settings_answer_as_eager(tiny_llava: Tiny, plain: Path, settings: dict[str, Any]) -> None:
    model, cases = tiny_llava
    runner = OnnxVLM(plain, threads=1)
    runner.generation = runner.generation | {"max_new_tokens": 6} | settings
    given: dict[str, Any] = {name: tensor.numpy() for name, tensor in cases["padded"].items()}
    expected = model.generate(**cases["padded"], **{"do_sample": False, "max_new_tokens": 6} | settings)
    assert runner.generate(**given).tolist() == expected.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (12, 0.3), (0, 1e-9)])
def test_shares_are_those_of_transformers(top_k: int, top_p: float) -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids: Any = torch.zeros(3, 1, dtype=torch.long)
    warped = TemperatureLogitsWarper(0.7)(ids, scores)
    warped = TopKLogitsWarper(top_k)(ids, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(ids, warped) if top_p < 1 else warped
    settings = {"do_sample": True, "temperature": 0.7, "top_k": top_k, "top_p": top_p}
    shares = Choice.read(settings, 50, "here").shares(scores.numpy())
    np.testing.assert_allclose(shares, warped.softmax(-1).numpy(), rtol=1e-6, atol=1e-9)


def test_chance_begins_at_the_seed() -> None:
    choice = Choice.read({"do_sample": True}, 50, "here")
    scores = np.zeros((4, 50), np.float32)
    ids = np.zeros((4, 2), np.int64)
    drawn = [choice.next(scores, ids, 2, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


UNSERVED: dict[str, Any] = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "sequence_bias": [[[5], 1.0]],
    "stop_strings": ".",
    "max_time": 1.0,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "exponential_decay_length_penalty": [1, 2.0],
    "made_up": 1,
}


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_other_settings_are_refused_by_the_runner(plain: Path, name: str) -> None:
    runner = OnnxVLM(plain, threads=1)
    runner.generation = runner.generation | {name: UNSERVED[name]}
    with pytest.raises(RunnerError, match=f"cannot honour {name}") as error:
        runner.generate(np.array([[1, 5]]))
    assert error.value.where.endswith("generation_config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "x"),
        ("eos_token_id", [99]),
        ("pad_token_id", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**12),
        ("temperature", 0),
        ("temperature", "hot"),
        ("top_p", float("nan")),
        ("repetition_penalty", -1),
        ("min_new_tokens", True),
        ("suppress_tokens", {"a": 1}),
    ],
)
def test_impossible_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RunnerError, match=name):
        Choice.read({name: value}, 99, "here")


def test_export_refuses_what_the_runner_cannot_honour(compiled_llava: CompiledVLM, tmp_path: Path) -> None:
    kept = copy.deepcopy(compiled_llava.generation_config)
    try:
        compiled_llava.generation_config.num_beams = 3
        with pytest.raises(ExportError, match="num_beams=3") as error:
            compiled_llava.export_onnx(tmp_path / "out")
        assert error.value.where and error.value.do and not (tmp_path / "out").exists()
    finally:
        compiled_llava.machine.host.generation_config = kept


def test_every_setting_is_honoured_without_effect_or_refused() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = HONOURED | WITHOUT_EFFECT
    assert known <= fields and set(NOTHING) <= fields and fields >= OF_CHANCE and not HONOURED & WITHOUT_EFFECT
    refused = {name.split("=")[0] for name in unserved(dict.fromkeys(fields, "set") | {"do_sample": True})}
    assert refused | known == fields
    # Settings of how the decoder runs do not concern the runner; settings that change answers are refused.
    assert known & set(generation_options.REFUSED) == {
        "output_attentions",
        "output_hidden_states",
        "cache_implementation",
        "cache_config",
        "compile_config",
        "prefill_chunk_size",
    }
