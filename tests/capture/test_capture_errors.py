"""A model or a sample that cannot be captured is refused with one error: what, where and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llava
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from qpcompile.capture.capture import SOURCES, capture
from qpcompile.capture.sample import two_rows
from qpcompile.capture.trace import _alike, trace
from qpcompile.errors import CalibrationError, CaptureError, ModelError
from qpcompile.recipe.recipe import Recipe

NONE = Recipe.load("none")


def test_language_model_is_refused() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ModelError, match="its forward takes no pictures") as error:
        capture(model, {"input_ids": ids, "pixel_values": torch.zeros(1)}, NONE)
    assert "AutoModelForImageTextToText" in str(error.value) and "'llama'" in str(error.value)


def test_model_that_generates_no_text_is_refused() -> None:
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**part, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**part, "vocab_size": 32}, vision_config=vision, projection_dim=8)).eval()
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ModelError, match="CLIPModel is not a vision-language model that generates text"):
        capture(model, inputs, NONE)


def test_decoder_that_reads_values_names_component_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases = llava()
    original = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if hidden_states.sum() > 1e9:
            hidden_states = hidden_states * 2
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    traces = [name for name, *_ in SOURCES]
    monkeypatch.setattr(
        "qpcompile.capture.capture.trace", lambda name, *given: traces.remove(name) or trace(name, *given)
    )
    with pytest.raises(CaptureError, match="prefill cannot be traced") as error:
        capture(model, cases["one"], NONE)
    assert traces == [name for name, *_ in SOURCES[1:]]  # it was the first: a refusal takes seconds
    assert error.value.where is not None and "if hidden_states.sum() > 1e9:" in error.value.where
    assert "model.language_model" in error.value.where and "test_capture_errors.py" in error.value.where


def test_decoder_that_selects_rows_by_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph runs; an artifact of it could not be loaded, which hours of compiling should not come before."""
    model, cases = llava()
    original = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden = original(self, hidden_states, **kwargs)
        positive = hidden[hidden > 0]
        return hidden + 0 * positive.sum()

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(CaptureError, match="depends on values, not on sizes") as error:
        capture(model, cases["one"], NONE)
    assert "selects rows by a mask" in str(error.value) and "model.language_model" in str(error.value)


def test_branch_that_tracing_cannot_see_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced code whose results differ from eager is refused, never returned."""
    model, _ = llava()
    owner = "model.multi_modal_projector"
    projector = model.get_submodule(owner)
    features = torch.randn(2, 5, 32)
    call = type("Call", (), {"inputs": {"image_features": features}, "output": projector(features)})()
    original = type(projector).forward

    def forward(self: torch.nn.Module, image_features: torch.Tensor) -> torch.Tensor:
        result = original(self, image_features)
        return result * 2 if torch.compiler.is_exporting() else result

    monkeypatch.setattr(type(projector), "forward", forward)
    with pytest.raises(CaptureError, match="the traced projector differs from eager in its output output"):
        trace("projector", owner, projector, call)  # type: ignore[arg-type]


def test_decoder_that_generate_bypasses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases = llava()
    original = LlamaModel.forward
    bypass = lambda self, *args, **kwargs: original(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(LlamaModel, "__call__", bypass, raising=False)
    with pytest.raises(CaptureError, match="does not call its decoder once per step"):
        capture(model, cases["one"], NONE)


def test_generate_that_fails_on_the_sample() -> None:
    model, cases = llava()
    inputs = dict(cases["one"], pixel_values=torch.zeros(1, 3, 40, 40))
    with pytest.raises(CaptureError, match="generate failed on the sample") as error:
        capture(model, inputs, NONE)
    assert "model.generate(**sample)" in str(error.value)


def test_sample_without_a_picture() -> None:
    model, cases = llava()
    inputs = {key: value for key, value in cases["one"].items() if key != "pixel_values"}
    with pytest.raises(CalibrationError, match="no picture"):
        capture(model, inputs, NONE)


def test_two_rows_pads_one_row_and_adds_no_picture_token() -> None:
    _, cases = llava()
    shorter = {key: cases["one"][key][:, 5:] for key in ("input_ids", "attention_mask")}  # begins with the picture
    inputs = cases["one"] | shorter
    doubled = two_rows(inputs, pad=0)
    assert doubled["input_ids"].shape == (2, inputs["input_ids"].shape[1] + 1)
    assert doubled["attention_mask"][:, 0].tolist() == [0, 1]
    assert (doubled["input_ids"] == 90).sum() == 2 * (inputs["input_ids"] == 90).sum()
    assert doubled["pixel_values"].shape[0] == 2


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        ([[90, 90, 5, 7]], [0, 7]),
        ([[5, 7, 90, 90]], [0, 7]),  # ends with its picture
        ([[5, 7, 90], [5, 90, 8]], [0, 5]),  # of text in every row
        ([[90, 90]], [0, 90]),  # nothing else
    ],
)
def test_two_rows_prepend_text(ids: list[list[int]], first: list[int]) -> None:
    inputs = {"input_ids": torch.tensor(ids), "pixel_values": torch.zeros(1, 3, 4, 4)}
    inputs["token_type_ids"] = inputs["input_ids"] * 2
    doubled = two_rows(inputs, pad=0, visual=[90, 91])
    assert doubled["input_ids"][:, 0].tolist() == first
    assert doubled["token_type_ids"][1, 0] == 2 * first[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_last_bits_of_16_bit_types_are_no_other_branch(dtype: torch.dtype) -> None:
    expected = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    far = expected.clone()
    far[:, 0] = -far[:, 0]  # one token of seven took another branch
    bits = 4 * torch.finfo(dtype).eps
    near = (expected.double() * (1 + bits * torch.randn(expected.shape))).to(dtype)
    assert _alike(expected.clone(), expected) and _alike(near, expected)
    assert not _alike(far, expected) and not _alike(torch.full_like(expected, torch.nan), expected)
    assert _alike(torch.zeros_like(expected), torch.zeros_like(expected))
    assert not _alike(expected, torch.zeros_like(expected))
