"""Decoders that take ids, choose what they attend to, or read pictures through cross-attention."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from qpcompile.capture import capture as capturing
from qpcompile.capture.adapters import traceable
from qpcompile.capture.capture import name_crossing
from qpcompile.capture.record import whole_cache, whole_layer
from qpcompile.capture.sample import two_rows
from qpcompile.capture.samples import Samples
from qpcompile.capture.trace import fixed_axes
from qpcompile.errors import CalibrationError, CaptureError
from qpcompile.ir.edit import is_call, layer_of
from qpcompile.ir.names import names
from qpcompile.ir.operators import EXPERT_LINEAR
from qpcompile.ir.program import DECODE, PREFILL, Graph
from qpcompile.ir.structure import CACHE_ARGUMENT, cached_tokens, named_tensors
from qpcompile.runtime.model_inputs import with_prompt
from qpcompile.runtime.prepare import embedded

IMAGE = 9


class Decoder(nn.Module):
    """Ids to embeddings of two channels; features of a picture are its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.arange(20.0).view(10, 2))

    def get_input_embeddings(self) -> nn.Module:
        return self.table


class Mixing(Decoder):
    """A decoder that puts pictures among its embeddings itself."""

    def get_image_features(self, pixels: torch.Tensor, return_dict: bool) -> Any:
        assert return_dict
        return SimpleNamespace(pooler_output=pixels)

    def get_placeholder_mask(self, ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: Any) -> torch.Tensor:
        return (ids == IMAGE)[..., None].expand_as(inputs_embeds)


def test_ids_are_looked_up_on_the_host() -> None:
    ids = torch.tensor([[1, 3]])
    found = embedded(Decoder(), {"input_ids": ids, "use_cache": True, "states": ids})
    assert found["inputs_embeds"].tolist() == [[[2.0, 3.0], [6.0, 7.0]]]
    assert set(found) == {"inputs_embeds", "use_cache", "states"}
    given = {"inputs_embeds": torch.ones(1, 1, 2)}
    assert embedded(Decoder(), given) is given and embedded(Decoder(), found) is found


@pytest.mark.parametrize("encoded", [False, True])
def test_pictures_are_put_among_the_embeddings_on_the_host(encoded: bool) -> None:
    ids, pixels = torch.tensor([[1, IMAGE]]), torch.tensor([[-1.0, -2.0]])
    beside = {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=pixels)}} if encoded else {}
    found = embedded(Mixing(), {"input_ids": ids, "pixel_values": pixels, **beside})
    assert found.keys() == {"inputs_embeds"}
    assert found["inputs_embeds"].tolist() == [[[2.0, 3.0], [-1.0, -2.0]]]
    # A decoder that has no such interface keeps the pixels: they are an input of its graph.
    assert embedded(Decoder(), {"input_ids": ids, "pixel_values": pixels})["pixel_values"] is pixels


def test_keys_that_layers_choose_by_are_states_that_grow() -> None:
    layer = DynamicIndexedLayer()
    layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 0))
    layer.update_indexer(torch.ones(2, 3, 5))
    cache = DynamicCache()
    cache.layers += [DynamicIndexedLayer(), layer]  # the first holds nothing yet
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(cache)}
    assert found == {
        "past_key_values.1.key": (2, 1, 3, 4),
        "past_key_values.1.value": (2, 1, 3, 0),
        "past_states.1.indexer_keys.0": (2, 3, 5),
    }
    assert fixed_axes("past_states.1.indexer_keys.0", 3) == (2,)
    assert fixed_axes("past_states.1.conv.0", 3) == (1, 2) and fixed_axes("past_states.1.cross.key", 4) == (1, 3)


def test_layers_without_keys_do_not_hide_the_length_of_a_cache() -> None:
    kinds = ["linear_attention", "moe", "full_attention"]
    text = SimpleNamespace(layer_types=kinds, per_layer_config=[SimpleNamespace()] * 3)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda **_: text))
    cache = whole_cache(model)
    cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 2)
    assert cache.get_seq_length() == cached_tokens(cache) == 5


def test_a_cache_of_an_encoder_and_a_decoder() -> None:
    own, cross = DynamicCache(), DynamicCache()
    own.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    cross.update(torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4), 0)
    found = {name: tensor.shape[2] for name, tensor in named_tensors(EncoderDecoderCache(own, cross))}
    expected = {"past_key_values.0.key": 3, "past_key_values.0.value": 3}
    assert found == expected | {"past_states.0.cross.key": 7, "past_states.0.cross.value": 7}


class Experts(nn.Module):
    """Two experts of a layer, in a loop over those that tokens chose."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4, generator=draw), requires_grad=False)
        self.down_proj = nn.Parameter(torch.randn(2, 4, 3, generator=draw), requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            row, place = torch.where(top_k_index == expert)
            inner = self._apply_gate(hidden_states[row] @ self.gate_up_proj[expert].T)
            out.index_add_(0, row, inner @ self.down_proj[expert].T * top_k_weights[row, place, None])
        return out

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return gate.clamp(max=0.5) * up


class Layer(nn.Module):
    """Experts and what chooses them: the best one of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = x[:, :2].softmax(dim=-1).topk(1)
        return self.experts(x, index, weights)


def test_a_loop_over_experts_is_one_product_per_expert() -> None:
    layer, draw = Layer(), torch.Generator().manual_seed(1)
    x, other = torch.randn(5, 4, generator=draw), torch.randn(9, 4, generator=draw)
    with traceable(layer):
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    assert any(is_call(node, EXPERT_LINEAR) for node in exported.graph.nodes)
    for rows in (x, other):
        torch.testing.assert_close(exported(rows), layer(rows))
    # A module with other arguments keeps its own code.
    near = nn.Sequential(nn.Linear(4, 4))
    with traceable(near):
        assert near(x).shape == (5, 4)


@pytest.mark.parametrize("chosen", [1, 2])
def test_experts_of_all_tokens_are_those_that_tokens_chose(chosen: int) -> None:
    """Llama 4's layer of experts: transformers multiplies all tokens by all of them, most by zero."""
    torch.manual_seed(0)
    config = Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=chosen)
    layer = Llama4TextMoe(config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, other = torch.randn(2, 5, 8), torch.randn(3, 7, 8)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with traceable(layer), torch.no_grad():
        exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    assert sum(is_call(node, EXPERT_LINEAR) for node in exported.graph.nodes) == 2
    with torch.no_grad():
        for tokens in (x, other):
            for found, expected in zip(exported(tokens), layer(tokens), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _graph(name: str, grows: bool) -> Graph:
    graph = fx.Graph()
    key, value = graph.placeholder("key"), graph.placeholder("value")
    kept = (graph.call_function(operator.add, (key, key)), value) if grows else (key, value)
    graph.output(kept)
    paths = names(("past_key_values.1.key", "past_key_values.1.value"))
    return Graph(name, fx.GraphModule(nn.Module(), graph), paths, paths, owner="model", returns={})


def test_keys_that_decoding_does_not_append_to_are_of_cross_attention() -> None:
    graphs = {PREFILL: _graph(PREFILL, True), DECODE: _graph(DECODE, False)}
    for _ in range(2):
        name_crossing(graphs)
        for graph in graphs.values():
            assert graph.inputs == graph.outputs == ("past_states.1.cross.key", "past_states.1.cross.value")
    usual = {PREFILL: _graph(PREFILL, True), DECODE: _graph(DECODE, True)}
    name_crossing(usual)
    assert usual[DECODE].outputs == ("past_key_values.1.key", "past_states.1.cross.value")


def test_what_tokens_see_of_pictures_grows_with_the_prompt() -> None:
    seen = torch.arange(6).view(1, 6, 1)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 4, 4), "image_attention_mask": seen}
    doubled = two_rows(inputs, pad=0)
    assert doubled["image_attention_mask"][..., 0].tolist() == [[5, 0, 1, 2, 3, 4, 5]] * 2
    # Sizes of pictures are no tokens, whatever the length of the prompt.
    sizes = torch.tensor([[1, 2, 3]])
    short = {"input_ids": ids[:, :3], "pixel_values": inputs["pixel_values"], "image_grid_thw": sizes}
    assert two_rows(short, pad=0)["image_grid_thw"].tolist() == [[1, 2, 3]] * 2
    assert two_rows(short | {"boxes": torch.zeros(1, 3, 4)}, pad=0, per_token="all")["boxes"].shape == (2, 4, 4)


class Taking(nn.Module):
    """A model that takes inputs of some sizes only, for `recorded`."""

    generation_config = SimpleNamespace(pad_token_id=0)
    config = SimpleNamespace()

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes


@pytest.mark.parametrize(
    ("sizes", "attempts"),
    [
        ({"patch_mask": (2, 7), "boxes": (2, 6)}, 1),
        ({"patch_mask": (2, 6), "boxes": (2, 6)}, 3),  # as many patches as tokens, by chance
        ({"patch_mask": (2, 7), "boxes": (2, 7)}, 4),  # where on a page each token is
    ],
)
def test_inputs_with_the_sizes_of_the_prompt_are_read_as_the_model_takes_them(
    sizes: dict[str, tuple[int, int]], attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []

    def record(model: Any, prompt: dict[str, Any]) -> str:
        tried.append(prompt)
        if any(prompt[key].shape[:2] != size for key, size in model.sizes.items()):
            raise CaptureError("sizes differ")
        return "recording"

    monkeypatch.setattr(capturing, "record", record)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    mask, boxes = torch.ones(1, 6, dtype=torch.long), torch.arange(24.0).view(1, 6, 4)
    sample = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 4, 4), "patch_mask": mask, "boxes": boxes}
    prompt, recording = capturing.recorded(Taking(sizes), sample)  # type: ignore[arg-type]
    assert recording == "recording" and prompt is tried[-1] and len(tried) == attempts
    assert prompt["input_ids"].shape == (2, 7) and prompt["pixel_values"].shape == (2, 3, 4, 4)
    if attempts == 4:
        assert prompt["boxes"][1, :2, 0].tolist() == [20.0, 0.0]
    with pytest.raises(CaptureError, match="sizes differ"):
        capturing.recorded(Taking({"boxes": (2, 5)}), sample)  # type: ignore[arg-type]


def test_layers_with_states_keep_all_tokens_beside_them() -> None:
    layers = (
        LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=3, number_of_states=2),
        DynamicSlidingWindowLayer(sliding_window=3),
        LinearAttentionLayer(),
    )
    mixed, window, states = map(whole_layer, layers)
    assert states is layers[2] and type(window) is DynamicLayer
    mixed.update_conv_state(torch.ones(1, 2, 4), conv_kernel_size=4, state_idx=1)
    for layer in (mixed, window):
        layer.update(torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4))
        assert layer.keys is not None and layer.keys.shape[2] == 5 and layer.get_mask_sizes(1) == (6, 0)


def test_a_prompt_that_the_model_starts_itself() -> None:
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=True), generation_config=SimpleNamespace(decoder_start_token_id=5)
    )
    pixels = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    started = with_prompt(model, pixels, 3)
    assert started["decoder_input_ids"].tolist() == [[5, 5, 5]] * 2
    assert with_prompt(model, started) is started
    assert with_prompt(SimpleNamespace(config=SimpleNamespace()), pixels) is pixels
    one = {"pixel_values": torch.zeros(1, 3, 4, 4)}
    doubled = two_rows(with_prompt(model, one, 3), pad=0)
    assert doubled["decoder_input_ids"].shape == (2, 3) and "attention_mask" not in doubled
    with pytest.raises(CalibrationError, match="no input_ids"):
        two_rows(one, pad=0)
    assert len(list(Samples([one, one], None, 2, 0))) == 2


def test_a_numbered_part_of_a_layer_is_no_layer() -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {
        "0": ("", nn.Module),
        "1": ("block.3", nn.Module),
        "2": ("block.3.layer.1", nn.Module),
    }
    assert layer_of(node) == 3
    node.meta["nn_module_stack"] = {"0": ("", nn.Module), "1": ("cross_layers.3", nn.Module)}
    assert layer_of(node) is None


class Counting(Decoder):
    """Counts positions by ids: those of padding, 0, have none."""

    padding_idx = 0

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        return inputs_embeds if position_ids is None else inputs_embeds + position_ids[..., None]

    @staticmethod
    def create_position_ids_from_input_ids(ids: torch.Tensor, padding: int, seen: int = 0) -> torch.Tensor:
        there = ids.ne(padding).long()
        return (there.cumsum(dim=1) + seen) * there + padding


def test_positions_that_a_decoder_counts_by_ids_are_given_with_embeddings() -> None:
    ids = torch.tensor([[0, 3, 5], [4, 1, 2]])
    assert embedded(Counting(), {"input_ids": ids})["position_ids"].tolist() == [[0, 1, 2], [1, 2, 3]]
    cache = DynamicCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    step = embedded(Counting(), {"input_ids": ids[:, :1] + 1, CACHE_ARGUMENT: cache})
    assert step["position_ids"].tolist() == [[4], [4]]
    given = torch.zeros(2, 3, dtype=torch.long)
    assert embedded(Counting(), {"input_ids": ids, "position_ids": given})["position_ids"] is given
    assert "position_ids" not in embedded(Decoder(), {"input_ids": ids})


def test_masks_are_broadcast_while_tracing_in_place_of_vmap() -> None:
    padding = torch.tensor([[False, True, True], [True, True, True]])

    def allowed(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & padding[batch, key]

    options: Any = {"batch_size": 2, "q_length": 3, "kv_length": 3, "mask_function": allowed, "use_vmap": True}
    options["allow_is_causal_skip"] = False
    expected = sdpa_mask(**options)
    with traceable(nn.Linear(1, 1)):
        found = sdpa_mask(**options)
        one = sdpa_mask(**{**options, "mask_function": lambda _batch, _head, query, key: key <= query})
    assert expected is not None and found is not None and one is not None
    assert torch.equal(found, expected) and one.shape == (2, 1, 3, 3)
