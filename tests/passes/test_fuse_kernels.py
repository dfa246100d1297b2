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
from qpcompile.ir.operators import (
    ACTIVATION_QUANTIZE,
    KRONECKER,
    LAYERNORM_QUANTIZE,
    QUANTIZE_DYNAMIC,
    RMSNORM_QUANTIZE,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.kernels.linear_int.packing import pack_int4
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
    return len(list(calls(graph, RMSNORM_QUANTIZE))), len(list(calls(graph, ACTIVATION_QUANTIZE)))


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
%1 = qpcompile::rmsnorm_quantize(%0, @norm.weight, 1e-06, None, True, None, None, None, 0, 1.0, 4) : (i8[B, S0, 8], f32[B, S0, 1])
%2 = operator.getitem(%1, 0) : i8[B, S0, 8]
%3 = operator.getitem(%1, 1) : f32[B, S0, 1]
# layers.0
@layers.0.gate_proj.weight_packed : u8[12, 4]
@layers.0.gate_proj.weight_scale : f32[12, 1]
%4 = qpcompile::linear_int(%2, %3, @layers.0.gate_proj.weight_packed, @layers.0.gate_proj.weight_scale, None, f32, 4) : f32[B, S0, 12]
@layers.0.up_proj.weight_packed : u8[12, 4]
@layers.0.up_proj.weight_scale : f32[12, 1]
%5 = qpcompile::linear_int(%2, %3, @layers.0.up_proj.weight_packed, @layers.0.up_proj.weight_scale, None, f32, 4) : f32[B, S0, 12]
# top
%6 = qpcompile::activation_quantize(%4, %5, 'silu', None, True, None, None, None, 0, 1.0, 4) : (i8[B, S0, 12], f32[B, S0, 1])
%7 = operator.getitem(%6, 0) : i8[B, S0, 12]
%8 = operator.getitem(%6, 1) : f32[B, S0, 1]
# layers.0
@layers.0.down_proj.weight_packed : u8[8, 6]
@layers.0.down_proj.weight_scale : f32[8, 1]
%9 = qpcompile::linear_int(%7, %8, @layers.0.down_proj.weight_packed, @layers.0.down_proj.weight_scale, None, f32, 4) : f32[B, S0, 8]
return y = %9
""",  # noqa: E501
    )


def test_nothing_to_do(apply: Apply) -> None:
    program = program_of(traced(LayerNormed(), TOKENS))
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
    assert fused(graph) == (1, 1) and not list(calls(graph, QUANTIZE_DYNAMIC))
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
    assert fused(graph) == left and len(list(calls(graph, QUANTIZE_DYNAMIC, TRANSFORM_QUANTIZE))) == 1
    miss = program.measured[NEAR_MISSES][0]
    assert miss.graph == "prefill" and miss.reason.endswith("has another reader")
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
    assert node.args[3:] == (1e-3, None, transform == "hadamard", None, None, None, 0, 1.0, 4)
    assert not list(calls(graph, QUANTIZE_DYNAMIC))
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
    assert apply(program, FuseKernels())
    assert not list(calls(graph, LAYERNORM_QUANTIZE))
    (quantize,) = calls(graph, TRANSFORM_QUANTIZE)
    assert program.measured[NEAR_MISSES][0].node == quantize.name
    assert program.measured[NEAR_MISSES][0].reason.endswith(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_half_precision_is_fused_and_stays_half(apply: Apply, dtype: torch.dtype, transform: str) -> None:
    feeds = {"x": TOKENS["x"].to(dtype)}
    graph = traced(NormedMlp().to(dtype), feeds)
    program = quantized(graph, f"quantize.transform={transform}")
    expected = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    assert fused(graph) == (1, 1) and not list(calls(graph, QUANTIZE_DYNAMIC))
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


class Chain(nn.Module):
    """What presets put before a quantizer: norm or activation, learned factors, centring, in one order of operands."""

    scale: Tensor
    shift: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.norm = kind, Norm()
        for name, sizes in {"left": (2, 2), "right": (4, 4), "shift": (8,), "scale": (8,)}.items():
            self.register_buffer(name, torch.randn(sizes))
        self.register_buffer("weight", pack_int4(torch.randint(-8, 8, (12, 8)).to(torch.int8)))
        self.register_buffer("weight_scale", torch.rand(12, 1))

    def source(self, x: Tensor) -> Tensor:
        functional = nn.functional
        return {
            "norm": lambda: self.norm(x),
            "silu": lambda: functional.silu(x),
            "gated, up first": lambda: (x + 1) * functional.silu(x),
            "gelu": lambda: functional.gelu(x),
            "tanh gelu, gated": lambda: functional.gelu(x, approximate="tanh") * (x + 1),
            "quick gelu": lambda: x * torch.sigmoid(1.702 * x),
            "other slope": lambda: x * torch.sigmoid(1.7 * x),
            "gated by a row": lambda: functional.silu(x) * x[:, :1],
            "sum": lambda: x + 1,
        }.get(self.kind.removesuffix(", scaled").removesuffix(", read twice"), lambda: self.norm(x))()

    def forward(self, x: Tensor) -> Tensor:
        ours = torch.ops.qpcompile
        source = self.source(x)
        if self.kind.endswith("scaled"):
            moved = source * self.scale
        else:
            moved = ours.kronecker(source, None, self.left, self.right)
        q, step = ours.quantize_dynamic(moved - self.shift, 0, 0.9, 4)
        y = ours.linear_int(q, step, self.weight, self.weight_scale, None, x.dtype, 4)
        return y + moved.sum() if self.kind.endswith("read twice") else y


CHAINS = {
    "norm": (RMSNORM_QUANTIZE, None),
    "norm, scaled": (RMSNORM_QUANTIZE, None),
    "silu": (ACTIVATION_QUANTIZE, "silu"),
    "gated, up first": (ACTIVATION_QUANTIZE, "silu"),
    "gelu": (ACTIVATION_QUANTIZE, "gelu"),
    "tanh gelu, gated": (ACTIVATION_QUANTIZE, "gelu_tanh"),
    "quick gelu": (ACTIVATION_QUANTIZE, "gelu_sigmoid"),
    "other slope": (TRANSFORM_QUANTIZE, None),
    "gated by a row": (TRANSFORM_QUANTIZE, None),
    "sum": (TRANSFORM_QUANTIZE, None),
    "norm, read twice": (TRANSFORM_QUANTIZE, None),
}
"""The operator that each chain becomes, and its function."""


def chained(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Program, Graph, dict[str, Tensor]]:
    feeds = {"x": TOKENS["x"].to(dtype)}
    module = Chain(kind)
    module.norm.to(dtype)
    program = program_of(traced(module, feeds))
    # Not by `run_passes`: operators of later stages would be refused.
    Canonicalize().run(program)
    program.stage = "quantized"
    return program, program.graphs["prefill"], feeds


@pytest.mark.parametrize("kind", CHAINS)
def test_what_presets_emit_is_one_operator(apply: Apply, kind: str) -> None:
    program, graph, feeds = chained(kind)
    expected = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    operator, function = CHAINS[kind]
    (node,) = calls(graph, operator)
    assert function is None or node.args[2] == function
    assert not list(calls(graph, QUANTIZE_DYNAMIC, KRONECKER)) or kind.endswith("read twice")
    assert relative(run(graph, **feeds)["y"], expected) < LAST_BIT
    reasons = [miss.reason for miss in program.measured[NEAR_MISSES]]
    assert bool(reasons) == kind.endswith(("read twice", "by a row"))
    assert not apply(program, FuseKernels()), "twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["norm", "norm, scaled", "gated, up first"])
def test_casts_of_half_precision_are_fused(apply: Apply, kind: str, dtype: torch.dtype) -> None:
    program, graph, feeds = chained(kind, dtype)
    expected = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    assert len(list(calls(graph, CHAINS[kind][0]))) == 1
    assert not list(calls(graph, QUANTIZE_DYNAMIC, KRONECKER, torch.ops.aten.to.dtype))
    assert relative(run(graph, **feeds)["y"].float(), expected.float()) < 0.1


def test_broken_stage_order_is_named() -> None:
    program = program_of(traced(NormedMlp(), TOKENS), stage="cut")
    with pytest.raises(InvariantError, match="fuse_kernels runs at the stages quantized to fused, the program is cut"):
        run_passes(program, [FuseKernels()])
