"""Keys and values in 4 bits, the same in prefill and in decode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import captured, changed_recipe, fresh, program_of, relative, run, stubbed
from torch import Tensor, fx
from toy_decoder import HIDDEN, Decode, Prefill, cache_names, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import InvariantError, RecipeError
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.names import names
from qpcompile.ir.operators import ATTENTION_KV, KV_READ, KV_WRITE, QUANT_STUB
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.pass_list import passes
from qpcompile.passes.quantize_kv_cache import QuantizeKvCache
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.recipe.plan import Plan

Apply = Callable[[Program, QuantizeKvCache], bool]
SETTINGS = (
    "quantize.weights.bits=16",
    "quantize.activations.bits=16",
    "quantize.transform=none",
    "quantize.smooth=null",
    "quantize.ignore=[]",
)
CACHE_ONLY = functools.partial(changed_recipe, "w4a4kv4", *SETTINGS)


def cached(masked: bool = True) -> Program:
    """The toy decoder, with stubs on its cache only, after the stage `cut`."""
    program = stubbed(prefill_graph(masked=masked), decode_graph(), recipe=CACHE_ONLY(), layers=2)
    program.stage = "cut"
    return program


def test_golden_prefill(apply: Apply) -> None:
    program = cached()
    assert apply(program, QuantizeKvCache())
    lines = graph_text(program.graphs[PREFILL]).splitlines(keepends=True)
    second = lines.index("# layers.1\n")
    first = lines.index("# layers.0\n")
    expecttest.assert_expected_inline(
        "".join(lines[first:second] + [line for line in lines if line.startswith("return")]),
        """\
# layers.0
@layers.0.self_attn.q_proj.weight : f32[8, 8]
%13 = aten::linear(%0, @layers.0.self_attn.q_proj.weight) : f32[B, S0, 8]
%14 = aten::view(%13, [%3, %2, 2, 4]) : f32[B, S0, 2, 4]
%15 = aten::transpose.int(%14, 1, 2) : f32[B, 2, S0, 4]
@layers.0.self_attn.k_proj.weight : f32[4, 8]
%16 = aten::linear(%0, @layers.0.self_attn.k_proj.weight) : f32[B, S0, 4]
%17 = aten::view(%16, [%3, %2, 1, 4]) : f32[B, S0, 1, 4]
%18 = aten::transpose.int(%17, 1, 2) : f32[B, 1, S0, 4]
%19 = qpcompile::kv_write(%18, 4) : (u8[B, 1, S0, 2], f32[B, 1, S0, 2])
%20 = operator.getitem(%19, 0) : u8[B, 1, S0, 2]
%21 = operator.getitem(%19, 1) : f32[B, 1, S0, 2]
@layers.0.self_attn.v_proj.weight : f32[4, 8]
%22 = aten::linear(%0, @layers.0.self_attn.v_proj.weight) : f32[B, S0, 4]
%23 = aten::view(%22, [%3, %2, 1, 4]) : f32[B, S0, 1, 4]
%24 = aten::transpose.int(%23, 1, 2) : f32[B, 1, S0, 4]
%25 = qpcompile::kv_write(%24, 4) : (u8[B, 1, S0, 2], f32[B, 1, S0, 2])
%26 = operator.getitem(%25, 0) : u8[B, 1, S0, 2]
%27 = operator.getitem(%25, 1) : f32[B, 1, S0, 2]
%28 = qpcompile::attention_kv(%15, %20, %21, %26, %27, %12, 0.5, 4, 4) : f32[B, 2, S0, 4]
%29 = aten::transpose.int(%28, 1, 2) : f32[B, S0, 2, 4]
%30 = aten::reshape(%29, [%3, %2, 8]) : f32[B, S0, 8]
@layers.0.self_attn.o_proj.weight : f32[8, 8]
%31 = aten::linear(%30, @layers.0.self_attn.o_proj.weight) : f32[B, S0, 8]
%32 = aten::add.Tensor(%0, %31) : f32[B, S0, 8]
return hidden = %52
return past_key_values.0.key.codes = %20
return past_key_values.0.key.affine = %21
return past_key_values.0.value.codes = %26
return past_key_values.0.value.affine = %27
return past_key_values.1.key.codes = %40
return past_key_values.1.key.affine = %41
return past_key_values.1.value.codes = %46
return past_key_values.1.value.affine = %47
""",
    )


def test_golden_decode(apply: Apply) -> None:
    program = cached()
    assert apply(program, QuantizeKvCache())
    expecttest.assert_expected_inline(
        graph_text(program.graphs["decode"]),
        """\
graph decode of model
%0 = input inputs_embeds : f32[B, 1, 8]
%1 = input attention_mask : bool[B, S0+1]
%2 = input past_key_values.0.key.codes : u8[B, 1, S0, 2]
%3 = input past_key_values.0.key.affine : f32[B, 1, S0, 2]
%4 = input past_key_values.0.value.codes : u8[B, 1, S0, 2]
%5 = input past_key_values.0.value.affine : f32[B, 1, S0, 2]
%6 = input past_key_values.1.key.codes : u8[B, 1, S0, 2]
%7 = input past_key_values.1.key.affine : f32[B, 1, S0, 2]
%8 = input past_key_values.1.value.codes : u8[B, 1, S0, 2]
%9 = input past_key_values.1.value.affine : f32[B, 1, S0, 2]
%10 = aten::sym_size.int(%8, 0) : int B
# top
%11 = aten::unsqueeze(%1, 1) : bool[B, 1, S0+1]
%12 = aten::unsqueeze(%11, 2) : bool[B, 1, 1, S0+1]
# layers.0
@layers.0.self_attn.q_proj.weight : f32[8, 8]
%13 = aten::linear(%0, @layers.0.self_attn.q_proj.weight) : f32[B, 1, 8]
%14 = aten::view(%13, [%10, 1, 2, 4]) : f32[B, 1, 2, 4]
%15 = aten::transpose.int(%14, 1, 2) : f32[B, 2, 1, 4]
@layers.0.self_attn.k_proj.weight : f32[4, 8]
%16 = aten::linear(%0, @layers.0.self_attn.k_proj.weight) : f32[B, 1, 4]
%17 = aten::view(%16, [%10, 1, 1, 4]) : f32[B, 1, 1, 4]
%18 = aten::transpose.int(%17, 1, 2) : f32[B, 1, 1, 4]
%19 = qpcompile::kv_write(%18, 4) : (u8[B, 1, 1, 2], f32[B, 1, 1, 2])
%20 = operator.getitem(%19, 0) : u8[B, 1, 1, 2]
%21 = operator.getitem(%19, 1) : f32[B, 1, 1, 2]
@layers.0.self_attn.v_proj.weight : f32[4, 8]
%22 = aten::linear(%0, @layers.0.self_attn.v_proj.weight) : f32[B, 1, 4]
%23 = aten::view(%22, [%10, 1, 1, 4]) : f32[B, 1, 1, 4]
%24 = aten::transpose.int(%23, 1, 2) : f32[B, 1, 1, 4]
%25 = qpcompile::kv_write(%24, 4) : (u8[B, 1, 1, 2], f32[B, 1, 1, 2])
%26 = operator.getitem(%25, 0) : u8[B, 1, 1, 2]
%27 = operator.getitem(%25, 1) : f32[B, 1, 1, 2]
%28 = aten::cat([%2, %20], 2) : u8[B, 1, S0+1, 2]
%29 = aten::cat([%3, %21], 2) : f32[B, 1, S0+1, 2]
%30 = aten::cat([%4, %26], 2) : u8[B, 1, S0+1, 2]
%31 = aten::cat([%5, %27], 2) : f32[B, 1, S0+1, 2]
%32 = qpcompile::attention_kv(%15, %28, %29, %30, %31, %12, 0.5, 4, 4) : f32[B, 2, 1, 4]
%33 = aten::transpose.int(%32, 1, 2) : f32[B, 1, 2, 4]
%34 = aten::reshape(%33, [%10, 1, 8]) : f32[B, 1, 8]
@layers.0.self_attn.o_proj.weight : f32[8, 8]
%35 = aten::linear(%34, @layers.0.self_attn.o_proj.weight) : f32[B, 1, 8]
%36 = aten::add.Tensor(%0, %35) : f32[B, 1, 8]
# layers.1
@layers.1.self_attn.q_proj.weight : f32[8, 8]
%37 = aten::linear(%36, @layers.1.self_attn.q_proj.weight) : f32[B, 1, 8]
%38 = aten::view(%37, [%10, 1, 2, 4]) : f32[B, 1, 2, 4]
%39 = aten::transpose.int(%38, 1, 2) : f32[B, 2, 1, 4]
@layers.1.self_attn.k_proj.weight : f32[4, 8]
%40 = aten::linear(%36, @layers.1.self_attn.k_proj.weight) : f32[B, 1, 4]
%41 = aten::view(%40, [%10, 1, 1, 4]) : f32[B, 1, 1, 4]
%42 = aten::transpose.int(%41, 1, 2) : f32[B, 1, 1, 4]
%43 = qpcompile::kv_write(%42, 4) : (u8[B, 1, 1, 2], f32[B, 1, 1, 2])
%44 = operator.getitem(%43, 0) : u8[B, 1, 1, 2]
%45 = operator.getitem(%43, 1) : f32[B, 1, 1, 2]
@layers.1.self_attn.v_proj.weight : f32[4, 8]
%46 = aten::linear(%36, @layers.1.self_attn.v_proj.weight) : f32[B, 1, 4]
%47 = aten::view(%46, [%10, 1, 1, 4]) : f32[B, 1, 1, 4]
%48 = aten::transpose.int(%47, 1, 2) : f32[B, 1, 1, 4]
%49 = qpcompile::kv_write(%48, 4) : (u8[B, 1, 1, 2], f32[B, 1, 1, 2])
%50 = operator.getitem(%49, 0) : u8[B, 1, 1, 2]
%51 = operator.getitem(%49, 1) : f32[B, 1, 1, 2]
%52 = aten::cat([%6, %44], 2) : u8[B, 1, S0+1, 2]
%53 = aten::cat([%7, %45], 2) : f32[B, 1, S0+1, 2]
%54 = aten::cat([%8, %50], 2) : u8[B, 1, S0+1, 2]
%55 = aten::cat([%9, %51], 2) : f32[B, 1, S0+1, 2]
%56 = qpcompile::attention_kv(%39, %52, %53, %54, %55, %12, 0.5, 4, 4) : f32[B, 2, 1, 4]
%57 = aten::transpose.int(%56, 1, 2) : f32[B, 1, 2, 4]
%58 = aten::reshape(%57, [%10, 1, 8]) : f32[B, 1, 8]
@layers.1.self_attn.o_proj.weight : f32[8, 8]
%59 = aten::linear(%58, @layers.1.self_attn.o_proj.weight) : f32[B, 1, 8]
%60 = aten::add.Tensor(%36, %59) : f32[B, 1, 8]
%61 = aten::cat([%2, %20], 2) : u8[B, 1, S0+1, 2]
%62 = aten::cat([%3, %21], 2) : f32[B, 1, S0+1, 2]
%63 = aten::cat([%4, %26], 2) : u8[B, 1, S0+1, 2]
%64 = aten::cat([%5, %27], 2) : f32[B, 1, S0+1, 2]
%65 = aten::cat([%6, %44], 2) : u8[B, 1, S0+1, 2]
%66 = aten::cat([%7, %45], 2) : f32[B, 1, S0+1, 2]
%67 = aten::cat([%8, %50], 2) : u8[B, 1, S0+1, 2]
%68 = aten::cat([%9, %51], 2) : f32[B, 1, S0+1, 2]
return hidden = %60
return past_key_values.0.key.codes = %61
return past_key_values.0.key.affine = %62
return past_key_values.0.value.codes = %63
return past_key_values.0.value.affine = %64
return past_key_values.1.key.codes = %65
return past_key_values.1.key.affine = %66
return past_key_values.1.value.codes = %67
return past_key_values.1.value.affine = %68
""",
    )


@pytest.mark.parametrize("name", ["none", "w4a16"])
def test_nothing_to_do(apply: Apply, name: str) -> None:
    settings = [] if name == "none" else ["quantize.ignore=[]"]
    program = stubbed(prefill_graph(), decode_graph(), recipe=changed_recipe(name, *settings), layers=2)
    run_passes(program, [QuantizeWeights()])
    assert not apply(program, QuantizeKvCache())


def round_trip(x: Tensor, bits: int) -> Tensor:
    return kv_read(*kv_write(x, bits), x.shape[-1], bits, x.dtype)


class Rounded(torch.nn.Module):
    """Attention of torch on keys and values that were quantized and dequantized."""

    def __init__(self, model: Prefill, k_bits: int = 4, v_bits: int = 4) -> None:
        super().__init__()
        self.model, self.k_bits, self.v_bits = model, k_bits, v_bits

    def forward(self, feeds: dict[str, Tensor], new: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the prompt, and of a new token on top of its cache."""
        original = torch.nn.functional.scaled_dot_product_attention

        def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return original(query, round_trip(key, self.k_bits), round_trip(value, self.v_bits), **options)

        patch = pytest.MonkeyPatch()
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        with torch.no_grad():
            hidden, *cache = self.model(**feeds)
            mask = torch.cat([feeds["attention_mask"], torch.ones(2, 1, dtype=torch.bool)], dim=1)
            names = [name.replace(".", "_") for name in cache_names(2)]
            token, *_ = Decode(self.model)(new, mask, **dict(zip(names, cache, strict=True)))
        patch.undo()
        return hidden, token


@pytest.mark.parametrize(
    ("settings", "bits"),
    [((), (4, 4)), (("bits=8",), (8, 8)), (("key_bits=8",), (8, 4)), (("bits=8", "key_bits=4"), (4, 8))],
    ids=str,
)
def test_numbers_of_prefill_and_decode(apply: Apply, settings: tuple[str, ...], bits: tuple[int, int]) -> None:
    program = cached()
    program.recipe = CACHE_ONLY(*(f"quantize.kv_cache.{each}" for each in settings))
    assert apply(program, QuantizeKvCache())
    feeds, new = toy_feeds(2, 6), toy_feeds(2, 1, 9)["inputs_embeds"]
    hidden, token = Rounded(Prefill(), *bits)(feeds, new)
    first = run(program.graphs["prefill"], **feeds)
    # Rows of padding are fully masked: they are 0 here and undefined in torch.
    assert relative(first["hidden"][:, 1:], hidden[:, 1:]) < 1e-5
    past = {name.replace(".", "_"): value for name, value in first.items() if name.startswith("past")}
    mask = torch.cat([feeds["attention_mask"], torch.ones(2, 1, dtype=torch.bool)], dim=1)
    second = run(program.graphs["decode"], inputs_embeds=new, attention_mask=mask, **past)
    assert relative(second["hidden"], token) < 1e-5
    for name in cache_names(2):
        assert torch.equal(second[f"{name}.codes"][:, :, :6], first[f"{name}.codes"]), "the past is written anew"
        assert second[f"{name}.codes"].dtype == torch.uint8 and second[f"{name}.codes"].shape == (
            2,
            1,
            7,
            bits[name.endswith("value")] // 2,
        )
    plain = run(prefill_graph(), **feeds)["hidden"]
    # Steps of range/15 change keys and values by 3 % of their range; they are one of two terms of each layer.
    least, most = (1e-4, 0.1) if 4 in bits else (1e-6, 0.01)
    assert least < relative(first["hidden"][:, 1:], plain[:, 1:]) < most


def test_causal_attention_without_a_mask_stays_causal(apply: Apply) -> None:
    program = cached(masked=False)
    assert any(True in node.args for node in calls(program.graphs[PREFILL], aten.scaled_dot_product_attention.default))
    apply(program, QuantizeKvCache())
    feeds = toy_feeds(2, 6)
    feeds["attention_mask"] = torch.ones_like(feeds["attention_mask"])
    hidden, _ = Rounded(Prefill())(feeds, torch.zeros(2, 1, HIDDEN))
    assert relative(run(program.graphs[PREFILL], **feeds)["hidden"], hidden) < 1e-5


def test_sites_are_one_per_layer_and_graph(apply: Apply) -> None:
    program = cached()
    apply(program, QuantizeKvCache())
    assert [(site.graph, site.name, site.cache_bits) for site in program.plan.sites] == [
        (graph, f"model.layers.{layer}.kv_cache", 4) for graph in ("decode", "prefill") for layer in (0, 1)
    ]
    assert program.plan == Plan.from_dict(program.plan.to_dict())
    for graph in program.language:
        assert len(list(calls(graph, ATTENTION_KV))) == 2 and len(list(calls(graph, KV_WRITE))) == 4
        assert not list(calls(graph, QUANT_STUB, aten.scaled_dot_product_attention.default))


def test_keys_of_other_bits_are_sites_of_their_own(apply: Apply) -> None:
    program = cached()
    program.recipe = CACHE_ONLY("quantize.kv_cache.key_bits=8")
    apply(program, QuantizeKvCache())
    assert [(site.name, site.cache_bits) for site in program.plan.sites if site.graph == "decode"] == [
        (f"model.layers.{layer}.kv_cache.{part}", bits) for layer in (0, 1) for part, bits in (("key", 8), ("value", 4))
    ]


def test_bits_of_keys_need_a_cache_of_codes() -> None:
    scheme = changed_recipe("w4a4kv4", "quantize.kv_cache.bits=16", "quantize.kv_cache.key_bits=8").quantize
    assert scheme is not None and scheme.kv_cache.bits_of("key") == 16
    with pytest.raises(RecipeError, match=r"kv_cache.key_bits: .*kivi rounds keys and values to the same bits"):
        CACHE_ONLY("quantize.kv_cache.granularity=kivi", "quantize.kv_cache.key_bits=8")


def test_another_reader_of_a_key_sees_what_attention_sees(apply: Apply) -> None:
    program = cached()
    for graph in program.language:
        stub = next(calls(graph, QUANT_STUB))
        key = next((user for user in stub.users if user.target is aten.cat.default), stub)
        with graph.module.graph.inserting_before(graph.output_node):
            reader = graph.module.graph.call_function(aten.relu.default, (key,))
        reader.meta["val"] = key.meta["val"]
        (values,) = graph.output_node.args
        graph.output_node.args = ((*values, reader),)  # type: ignore[misc]
        graph.outputs = names((*graph.outputs, "extra"))
        graph.module.recompile()
    feeds = toy_feeds(2, 5)
    plain = run(program.graphs[PREFILL], **feeds)["past_key_values.0.key"]
    assert apply(program, QuantizeKvCache())
    prefill, decode = program.language
    found = run(prefill, **feeds)
    rounded = kv_read(*kv_write(plain, 4), plain.shape[-1], 4, plain.dtype)
    assert torch.equal(found["extra"], rounded.relu()) and not torch.equal(rounded, plain)
    assert "past_key_values.0.key" not in decode.inputs, "the cache is kept as codes only"
    (read,) = calls(decode, KV_READ)
    assert [str(user.target) for user in read.users] == ["aten.relu.default"]
    assert isinstance(read.args[0], fx.Node) and read.args[0].target is aten.cat.default


def test_hand_broken_cache_is_named(apply: Apply) -> None:
    program = cached()
    apply(program, QuantizeKvCache())
    graph = program.graphs[PREFILL]
    graph.outputs = names(path.replace("1.value.affine", "1.value.scale") for path in graph.outputs)
    with pytest.raises(InvariantError, match=r"disagree on the cache: .*1\.value\.affine") as error:
        verify(program)
    assert error.value.ran == "quantize_kv_cache"


def test_stubs_left_behind_are_named() -> None:
    program = cached()
    program.stage = "quantized"
    with pytest.raises(InvariantError, match=r"calls qpcompile.quant_stub.default at the stage quantized"):
        verify(program)


def test_program_without_decoder_caches(apply: Apply) -> None:
    program = program_of(recipe=CACHE_ONLY(), stage="cut")
    assert not apply(program, QuantizeKvCache())


def test_kivi_rounds_the_cache_alone(apply: Apply) -> None:
    program = cached()
    program.recipe = CACHE_ONLY("quantize.kv_cache.granularity=kivi")
    assert apply(program, QuantizeKvCache())
    feeds = toy_feeds(2, 200)
    first, exact = run(program.graphs["prefill"], **feeds), run(prefill_graph(), **feeds)
    assert torch.allclose(first["hidden"][:, 1:], exact["hidden"][:, 1:], atol=1e-6), "prefill attends to exact values"
    for name in cache_names(2):
        assert first[name].dtype == torch.float32 and not torch.allclose(first[name], exact[name], atol=1e-3)
        assert torch.equal(first[name][:, :, 72:], exact[name][:, :, 72:]), "the last 128 tokens stay exact"
    assert all(site.kernel.startswith("simulation") for site in program.plan.sites)


def test_keys_that_choose_pivots_are_read_back() -> None:
    """DART's pivots read the same keys as attention."""
    settings = ("tokens.method=dart", "tokens.keep=0.5", "quantize.weights.solver=rtn", "quantize.smooth=null")
    plain = ("quantize.center=null", "quantize.activations.clip_search=false", "tokens.candidate_layers=[0]")
    program = fresh(changed_recipe("w4a4kv4", *settings, *plain))
    run_passes(program, passes([captured()[1]["one"]], 1))
    text = graph_text(program.graphs[PREFILL])
    assert "qpcompile::pivot_tokens" in text and "qpcompile::kv_read" in text and "quant_stub" not in text
