"""A norm or gated product and the following quantizer are fused into one operator, and so is rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import changed_recipe, program_of, relative, run, stubbed, traced
from torch import Tensor, nn
from toy_decoder import HIDDEN, Mlp, Norm, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import calls
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.operators import LAYERNORM_QUANTIZE, QUANTIZE_INT4, RMSNORM_QUANTIZE, ROPE, SILU_MUL_QUANTIZE
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.fuse_kernels import FuseKernels
from qpcompile.passes.quantize_kv_cache import QuantizeKvCache
from qpcompile.passes.quantize_weights import QuantizeWeights

PLAIN = ("quantize.ignore=[]", "quantize.center=null", "quantize.transform=hadamard")
Apply = Callable[[Program, FuseKernels], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}
# Sums in float64 against float32; none of these values is so close to a tie that its code changes.
LAST_BIT = 1e-6


class NormedMlp(nn.Module):
    """A norm and a gated product; `kind` names what prevents their fusion."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = Norm()
        self.layers = nn.ModuleList([Mlp()])

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.layers[0]
        normed = self.norm(x)
        gate = nn.functional.silu(mlp.gate_proj(normed))
        product = gate * mlp.up_proj(normed)
        y = mlp.down_proj(product)
        if self.kind == "norm read twice":
            return y + normed
        if self.kind == "product read twice":
            return y + product.sum()
        return y + gate.sum() if self.kind == "silu read twice" else y


def quantized(graph: Graph, *settings: str) -> Program:
    """A program whose linears are quantized, ready to be fused."""
    program = stubbed(graph, recipe=changed_recipe("w4a4kv4", *PLAIN, *settings))
    run_passes(program, [FoldTransforms(), QuantizeWeights()])
    program.stage = "quantized"
    return program


def fused(graph: Graph) -> tuple[int, int]:
    return len(list(calls(graph, RMSNORM_QUANTIZE))), len(list(calls(graph, SILU_MUL_QUANTIZE)))


def test_golden(apply: Apply) -> None:
    graph = traced(NormedMlp(), TOKENS)
    assert apply(quantized(graph), FuseKernels())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# norm
@norm.weight : f32[8]
%1 = qpcompile::rmsnorm_quantize(%0, @norm.weight, 1e-06, None, True, 0, 1.0) : (i8[B, S0, 8], f32[B, S0, 1])
%2 = operator.getitem(%1, 0) : i8[B, S0, 8]
%3 = operator.getitem(%1, 1) : f32[B, S0, 1]
# layers.0
@layers.0.gate_proj.weight_packed : u8[12, 4]
@layers.0.gate_proj.weight_scale : f32[12, 1]
%4 = qpcompile::linear_w4a4(%2, %3, @layers.0.gate_proj.weight_packed, @layers.0.gate_proj.weight_scale, None, f32) : f32[B, S0, 12]
@layers.0.up_proj.weight_packed : u8[12, 4]
@layers.0.up_proj.weight_scale : f32[12, 1]
%5 = qpcompile::linear_w4a4(%2, %3, @layers.0.up_proj.weight_packed, @layers.0.up_proj.weight_scale, None, f32) : f32[B, S0, 12]
# top
%6 = qpcompile::silu_mul_quantize(%4, %5, None, True, 0, 1.0) : (i8[B, S0, 12], f32[B, S0, 1])
%7 = operator.getitem(%6, 0) : i8[B, S0, 12]
%8 = operator.getitem(%6, 1) : f32[B, S0, 1]
# layers.0
@layers.0.down_proj.weight_packed : u8[8, 6]
@layers.0.down_proj.weight_scale : f32[8, 1]
%9 = qpcompile::linear_w4a4(%7, %8, @layers.0.down_proj.weight_packed, @layers.0.down_proj.weight_scale, None, f32) : f32[B, S0, 8]
return y = %9
""",  # noqa: E501
    )


def test_nothing_to_do(apply: Apply) -> None:
    program = program_of(traced(NormedMlp(), TOKENS))
    run_passes(program, [Canonicalize()])
    program.stage = "quantized"
    assert not apply(program, FuseKernels())


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("smooth", ["null", "0.5"])
def test_numbers(apply: Apply, transform: str, smooth: str) -> None:
    graph = traced(NormedMlp(), TOKENS)
    program = quantized(graph, f"quantize.transform={transform}", f"quantize.smooth={smooth}")
    expected = run(graph, **TOKENS)["y"]
    assert apply(program, FuseKernels())
    assert fused(graph) == (1, 1) and not list(calls(graph, QUANTIZE_INT4))
    assert relative(run(graph, **TOKENS)["y"], expected) < LAST_BIT


def test_numbers_of_a_whole_decoder(apply: Apply) -> None:
    recipe = changed_recipe("w4a4kv4", *PLAIN)
    program = stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe, layers=2)
    run_passes(program, [FoldTransforms(), QuantizeWeights()])
    program.stage = "cut"
    run_passes(program, [QuantizeKvCache()])
    feeds = toy_feeds(2, 6)
    expected = run(program.graphs["prefill"], **feeds)
    assert apply(program, FuseKernels())
    assert [fused(graph) for graph in program.language] == [(4, 2), (4, 2)]
    for name, value in run(program.graphs["prefill"], **feeds).items():
        assert relative(value, expected[name]) < LAST_BIT, name


# Expected: (fused norms, fused products).
APART = {"norm read twice": (0, 1), "product read twice": (1, 0), "silu read twice": (1, 0)}


@pytest.mark.parametrize(("kind", "left"), APART.items(), ids=list(APART))
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_another_reader_keeps_them_apart(apply: Apply, kind: str, left: tuple[int, int], transform: str) -> None:
    graph = traced(NormedMlp(kind), TOKENS)
    program = quantized(graph, f"quantize.transform={transform}")
    expected = run(graph, **TOKENS)["y"]
    apply(program, FuseKernels())
    assert fused(graph) == left and len(list(calls(graph, QUANTIZE_INT4))) == 1
    assert [miss.graph for miss in program.measured[NEAR_MISSES]] == ["prefill"]
    assert program.measured[NEAR_MISSES][0].reason.endswith("has another reader")
    assert relative(run(graph, **TOKENS)["y"], expected) < LAST_BIT


class LayerNormed(nn.Module):
    """A layer norm and its readers; `kind` names what prevents their fusion."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = nn.LayerNorm(HIDDEN, eps=1e-3, elementwise_affine=kind != "no weight", bias=kind != "no bias")
        self.layers = nn.ModuleList([Mlp()])
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.layers[0]
        normed = self.norm(x + 2)
        y = mlp.gate_proj(normed)
        return y + normed.sum() if self.kind == "norm read twice" else y


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_a_layer_norm_is_fused(apply: Apply, transform: str) -> None:
    graph = traced(LayerNormed(), TOKENS)
    program = quantized(graph, f"quantize.transform={transform}")
    expected = run(graph, **TOKENS)["y"]
    assert apply(program, FuseKernels())
    (node,) = calls(graph, LAYERNORM_QUANTIZE)
    assert node.args[3:] == (1e-3, None, transform == "hadamard", 0, 1.0)
    assert not list(calls(graph, QUANTIZE_INT4))
    assert relative(run(graph, **TOKENS)["y"], expected) < LAST_BIT


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("norm read twice", "has another reader"),
        ("no weight", "has no weight or no bias"),
        ("no bias", "has no weight or no bias"),
    ],
)
def test_other_layer_norms_stay_apart(apply: Apply, kind: str, reason: str) -> None:
    graph = traced(LayerNormed(kind), TOKENS)
    program = quantized(graph)
    assert not apply(program, FuseKernels())
    (quantize,) = calls(graph, QUANTIZE_INT4)
    assert [miss.node for miss in program.measured[NEAR_MISSES]] == [quantize.name]
    assert program.measured[NEAR_MISSES][0].reason.endswith(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_half_precision_is_fused_and_stays_half(apply: Apply, dtype: torch.dtype, transform: str) -> None:
    feeds = {"x": TOKENS["x"].to(dtype)}
    graph = traced(NormedMlp().to(dtype), feeds)
    program = quantized(graph, f"quantize.transform={transform}")
    expected = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    assert fused(graph) == (1, 1) and not list(calls(graph, QUANTIZE_INT4))
    found = run(graph, **feeds)["y"]
    assert found.dtype == dtype
    # Values between norm, transform and quantizer are no longer rounded: one or two 4-bit codes may change.
    assert relative(found.float(), expected.float()) < 0.1


def test_other_types_stay_apart(apply: Apply) -> None:
    feeds = {"x": TOKENS["x"].double()}
    graph = traced(NormedMlp().double(), feeds)
    program = quantized(graph)
    assert not apply(program, FuseKernels())
    assert fused(graph) == (0, 0)
    assert {miss.reason.split(" is ")[1] for miss in program.measured[NEAR_MISSES]} == {"torch.float64"}


def test_broken_stage_order_is_named() -> None:
    program = program_of(traced(NormedMlp(), TOKENS), stage="cut")
    with pytest.raises(InvariantError, match="fuse_kernels runs at the stages quantized to fused, the program is cut"):
        run_passes(program, [FuseKernels()])


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


class Turned(nn.Module):
    """Rotary embedding as in transformers; `kind` names a near miss."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.kind == "in float32":
            wide = x.float()
            return (wide * cos.float() + halves(wide) * sin.float()).to(x.dtype)
        if self.kind == "neighbours":
            return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin
        if self.kind == "other sign":
            return x * cos + torch.cat((x[..., 4:], -x[..., :4]), dim=-1) * sin
        if self.kind == "other halves":
            return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin
        if self.kind == "of another":
            return x * cos + halves(x + 1) * sin
        if self.kind == "read twice":
            turned = halves(x) * sin
            return x * cos + turned + turned
        return x * cos + halves(x) * sin


def turning(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Program, dict[str, Tensor]]:
    feeds = {"x": torch.randn(2, 5, 3, 8), "cos": torch.randn(2, 5, 1, 8), "sin": torch.randn(2, 5, 1, 8)}
    feeds = {name: tensor.to(dtype) for name, tensor in feeds.items()}
    program = program_of(traced(Turned(kind), feeds))
    run_passes(program, [Canonicalize()])
    program.stage = "quantized"
    return program, feeds


@pytest.mark.parametrize("kind", ["", "in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_positions_are_one_node(apply: Apply, dtype: torch.dtype, kind: str) -> None:
    program, feeds = turning(kind, dtype)
    graph = program.graphs["prefill"]
    before = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    assert len(list(calls(graph, ROPE))) == 1 and not list(calls(graph, torch.ops.aten.cat.default))
    after = run(graph, **feeds)["y"]
    assert after.dtype == dtype
    # Half precision rounded after each step, and now rounds once.
    assert torch.equal(after, before) if dtype == torch.float32 or kind else relative(after, before) < 1e-2
    assert not apply(program, FuseKernels()), "twice"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("neighbours", None),
        ("other sign", "is not (-x2, x1)"),
        ("other halves", "does not join the halves of x"),
        ("of another", "does not join the halves of x"),
        ("read twice", "has another reader"),
    ],
)
def test_what_only_looks_like_rotary_positions_stays(kind: str, reason: str | None) -> None:
    program, feeds = turning(kind)
    graph = program.graphs["prefill"]
    before = run(graph, **feeds)["y"]
    FuseKernels().run(program)
    assert not list(calls(graph, ROPE))
    found = [miss.reason for miss in program.measured[NEAR_MISSES]]
    assert not found if reason is None else len(found) == 1 and found[0].endswith(reason)
    assert torch.equal(run(graph, **feeds)["y"], before)
