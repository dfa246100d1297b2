"""A hand-made plan, a small graph, and one tiny model that is really compiled, with a hand-made processor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image

import qpcompile
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.artifact.graph_json import FORMAT, read_graph
from qpcompile.ir.program import PREFILL, Graph
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

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(token) for token in ids)

    def batch_decode(self, rows: list[list[int]] | torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(f"<{token}>" for token in torch.as_tensor(row).tolist()) for row in rows]


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


WEIGHTS = {"packed": torch.zeros(4, 2, dtype=torch.uint8), "scale": torch.ones(4, 1)}
# (type, module, operator, operands) of the calls from %2 on; "%3" refers to a value, "@packed" to a weight.
CALLS: tuple[tuple[str, str | None, str, list[Any]], ...] = (
    ("int S0", None, "aten::sym_size.int", ["%1", 1]),
    ("f32[B, S0, 4]", "layers.0", "aten::relu.default", ["%1"]),
    ("(i8[B, S0, 4], f32[B, S0, 1])", "layers.1", "qpcompile::quantize_dynamic.default", ["%3", 0, 1.0, 4]),
    ("i8[B, S0, 4]", "layers.1", "operator.getitem", ["%4", 0]),
    ("f32[B, S0, 1]", None, "operator.getitem", ["%4", 1]),
    (
        "f32[B, S0, 4]",
        "layers.1.up",
        "qpcompile::linear_int.default",
        ["%5", "%6", "@packed", "@scale", None, {"dtype": "float32"}, 4],
    ),
    ("int B", "", "aten::sym_size.int", ["%0", 0]),
    ("f32[B, S0, 4]", "layers.1", "aten::view.default", ["%7", ["%8", "%2", 4]]),
    ("f32[B, S0, 4]", "layers.1", "aten::add.Tensor", ["%3", "%9"]),
    ("f32[B, S0, 4]", "layers.1", "aten::mul.Tensor", ["%10", "%0"]),
    ("f32[B, S0, 4]", "norm", "aten::neg.default", ["%11"]),
)


@pytest.fixture
def graph() -> Graph:
    """The graph that test_layer_nodes.py prints: the second layer reads a mask, a size, and what the first computed."""
    nodes: list[dict[str, Any]] = [
        {"label": "%0", "op": "input", "type": "bool[B, S0]"},
        {"label": "%1", "op": "input", "type": "f32[B, S0, 4]"},
        {"label": _label("@packed"), "op": "weight", "type": "u8[4, 2]", "key": "packed"},
        {"label": _label("@scale"), "op": "weight", "type": "f32[4, 1]", "key": "scale"},
    ]
    for number, (kind, module, target, args) in enumerate(CALLS, 2):
        entry = {"label": f"%{number}", "op": "call", "type": kind, "target": target, "args": _stored(args)}
        nodes.append(entry if module is None else entry | {"module": module})
    nodes.append({"op": "output", "args": {"tuple": _stored(["%12", "%10"])}})
    outputs = ["hidden", "cache.0"]
    names = {"inputs": ["mask", "x"], "outputs": outputs, "returns": outputs}
    head = {"format": FORMAT, "name": PREFILL, "owner": "model", **names, "constants": {}}
    return read_graph(json.dumps({**head, "nodes": nodes}), WEIGHTS, "a test")


def _label(text: str) -> str:
    return text.replace("@", "@layers.1.up.weight_")


def _stored(values: list[Any]) -> list[Any]:
    """Operands as an artifact stores them."""
    return [
        _stored(each) if isinstance(each, list) else {"ref": _label(each)} if isinstance(each, str) else each
        for each in values
    ]


@pytest.fixture(scope="session")
def compiled() -> CompiledVLM:
    """The tiny LLaVA, quantized and cut after layers 0 and 1; do not change it."""
    model, cases = llava()
    recipe = Recipe.load("quota-30").with_overrides(["tokens.candidate_layers=[0,1]", "quantize.weights.solver=rtn"])
    return qpcompile.compile(model, recipe, processor=TinyProcessor(), calibration=[cases["one"]])
