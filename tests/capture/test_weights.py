"""A model object is accepted unchanged, or refused with an error that names the defect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_checkpoint import tiny_model
from torch import nn

import qpcompile
from qpcompile.capture.weights import check_model
from qpcompile.errors import ModelError


def refused(model: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_model(model)
    assert caught.value.what and caught.value.where and caught.value.do
    return caught.value


def query(model: Any) -> Any:
    """The first layer's attention, whose q_proj tests replace."""
    return model.model.language_model.layers[0].self_attn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_model_is_returned(dtype: torch.dtype) -> None:
    model: Any = tiny_model().to(dtype)
    assert check_model(model) is model


@pytest.mark.parametrize("thing", [3, None, nn.Linear(2, 2)], ids=lambda thing: type(thing).__name__)
def test_what_is_no_model(thing: Any) -> None:
    assert f"a {type(thing).__name__} is not a transformers model" in refused(thing).what


def test_compile_checks_the_model_it_is_given() -> None:
    model: Any = tiny_model()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="1 tensors of the model hold NaN"):
        qpcompile.compile(model, "none")


class PeftLike(nn.Module):
    """The part of peft's models and layers that is recognised."""

    def merge_and_unload(self) -> None: ...


def test_model_of_peft() -> None:
    error = refused(PeftLike())
    assert "adapters that are not merged" in error.what and error.do == "pass model.merge_and_unload()"


def test_layers_of_peft_inside_a_model() -> None:
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = tiny_model()
    query(model).q_proj = layer(32, 32)
    assert "1 layers of the model have adapters" in refused(model).what


class Codes(nn.Module):
    """A linear in one of the forms in which quantizers store it."""

    def __init__(self, parameter: Any = None, buffer: Any = None) -> None:
        super().__init__()
        if parameter is not None:
            self.weight = parameter
        self.register_buffer("qweight", buffer)


class OwnParameter(nn.Parameter):
    """A parameter class of a quantizer."""


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Codes(nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)), "q_proj.weight is of uint8"),
        (
            Codes(nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)),
            "q_proj.weight is of float8_e4m3fn",
        ),
        (Codes(OwnParameter(torch.zeros(2, 2))), "q_proj.weight is of OwnParameter"),
        (Codes(buffer=torch.zeros(2, 2, dtype=torch.int32)), "q_proj.qweight is of int32"),
    ],
)
def test_quantized_layers(layer: nn.Module, said: str) -> None:
    model = tiny_model()
    query(model).q_proj = layer
    error = refused(model)
    assert said in error.what and error.do and "full-precision" in error.do


@pytest.mark.parametrize("mark", [{"quant_method": "hqq"}, type("Config", (), {"quant_method": "hqq"})()])
def test_models_that_transformers_quantized(mark: Any) -> None:
    model = tiny_model()
    model.config.quantization_config = mark
    assert refused(model).what == "the model is quantized already (hqq)"


def test_weights_that_are_elsewhere() -> None:
    assert "tensors of the model are not in memory" in refused(tiny_model().to("meta")).what
