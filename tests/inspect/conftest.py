"""A hand-made plan, a small printed graph, and one tiny model that is really compiled, with a hand-made processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.recipe.plan import Cut, Layer, LayerFacts, LeftOut, Plan, Sensitivity, Site
from qpcompile.recipe.recipe import Recipe
from tests.families import IMAGE, llava

LAYERS = 6


class TinyProcessor:
    """Pictures of 32 x 32 pixels and any text become a prompt of 16 picture tokens between text."""

    chat_template = "none is read"
    image_processor = None

    def apply_chat_template(self, messages: list[list[dict[str, Any]]], **_: Any) -> dict[str, torch.Tensor]:
        picture, text = messages[0][0]["content"]
        image: Image.Image = picture["image"].resize((32, 32))
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).reshape(1, 32, 32, 3)
        words = [3 + ord(letter) % 70 for letter in text["text"]]
        ids = torch.tensor([[1, 5, *[IMAGE] * 16, *words]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels.permute(0, 3, 1, 2) / 255,
        }

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(token) for token in ids.tolist())


@pytest.fixture
def plan() -> Plan:
    """Six layers, three candidates, two cuts, one linear in two graphs, a cache and an excluded linear."""
    name = "model.layers.{}.mlp.up_proj".format
    both = ("prefill", "decode")
    linears = [
        Site(graph=graph, name=name(layer), weight_bits=4, activation_bits=4, error=0.01 * (layer + 1), kernel="op::a")
        for layer in range(2)
        for graph in both
    ]
    return Plan(
        recipe=Recipe.load("quota-30"),
        layers=tuple(Layer(index=index, name=f"model.layers.{index}") for index in range(LAYERS)),
        candidate_layers=(1, 2, 3),
        facts=tuple(LayerFacts(layer=i, mass_median=0.3 + 0.05 * i, mass_iqr=0.1, cosine=0.5) for i in range(LAYERS)),
        sensitivity=tuple(Sensitivity(layer=i, raw=0.1 * i, normalized=0.2 * i) for i in (1, 2, 3)),
        cuts=(
            Cut(layer=1, ratio=0.5, numerator=1, denominator=2),
            Cut(layer=3, ratio=0.3, numerator=3, denominator=10),
        ),
        sites=(*linears, Site(graph="prefill", name="model.layers.0.kv_cache", cache_bits=4, kernel="op::kv")),
        left_out=tuple(LeftOut(graph=graph, name="model.proj", reason="on the <ignore> list") for graph in both),
    )


@pytest.fixture
def printed() -> str:
    """A printed graph of two layers; the second reads a mask, a size, and what the first computed."""
    return """\
graph prefill of model
%0 = input mask : bool[B, S0]
%1 = input x : f32[B, S0, 4]
%2 = aten::sym_size.int(%1, 1) : int S0
# layers.0
%3 = aten::relu(%1) : f32[B, S0, 4]
# layers.1
@layers.1.up.weight_packed : u8[4, 2]
@layers.1.up.weight_scale : f32[4, 1]
%4 = qpcompile::quantize_int4(%3, 0, 1.0) : (i8[B, S0, 4], f32[B, S0, 1])
%5 = operator.getitem(%4, 0) : i8[B, S0, 4]
%6 = operator.getitem(%4, 1) : f32[B, S0, 1]
%7 = qpcompile::linear_w4a4(%5, %6, @layers.1.up.weight_packed, @layers.1.up.weight_scale, None, f32) : f32[B, S0, 4]
# top
%8 = aten::sym_size.int(%0, 0) : int B
# layers.1
%9 = aten::view(%7, [%8, %2, 4]) : f32[B, S0, 4]
%10 = aten::add.Tensor(%3, %9) : f32[B, S0, 4]
%11 = aten::mul.Tensor(%10, %0) : f32[B, S0, 4]
# norm
%12 = aten::neg(%11) : f32[B, S0, 4]
return hidden = %12
return cache.0 = %10
"""


@pytest.fixture(scope="session")
def compiled() -> CompiledVLM:
    """The tiny LLaVA, quantized and cut after layers 0 and 1; do not change it."""
    model, cases = llava()
    recipe = Recipe.load("quota-30").with_overrides(["tokens.candidate_layers=[0,1]", "quantize.weights.solver=rtn"])
    return qpcompile.compile(model, recipe, processor=TinyProcessor(), calibration=[cases["one"]])
