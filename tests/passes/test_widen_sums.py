"""With exact numerics sums are float64 and rounded once; with fast ones, the default, graphs are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from families import llava
from programs import program_of, relative, run, traced
from torch import Tensor, nn

import qpcompile
from qpcompile.errors import InvariantError, RecipeError
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.kernels.hadamard.reference import hadamard
from qpcompile.passes.widen_sums import WidenSums
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.devices import move

Apply = Callable[[Program, WidenSums], bool]
WIDTH = 6
TOKENS = {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))}


class Normed(nn.Module):
    """A norm and a gate, quantized unless `plain`."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y * torch.sigmoid(y)
        return y if self.plain else torch.ops.qpcompile.quantize_dynamic(y, 0, 1.0, 4)[0]


class Plain(nn.Module):
    """Arithmetic that is the same everywhere, and a quantizer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qpcompile.quantize_dynamic(x * 2 + x.abs(), 0, 1.0, 4)[0]


class Patches(nn.Module):
    """A convolution and the quantizer after it; a stride of its kernel size gives patches that do not overlap."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qpcompile.quantize_dynamic(self.embed(x), 0, 1.0, 4)[1]


def wide(graph: Graph) -> int:
    """How many operators compute in float64."""
    made = [node for node in graph.nodes if node.op == "call_function" and node.target is not aten.to.dtype]
    return sum(isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype == torch.float64 for node in made)


class Ours(nn.Module):
    """One operator of each kind of ours: a gate of two operands, a norm, a rotation, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ours, plain = torch.ops.qpcompile, (None, True, None, None, None, 0, 1.0, 4)
        gated, _ = ours.activation_quantize(x, x, "silu", *plain)
        normed, _ = ours.rmsnorm_quantize(x, self.weight, 1e-5, *plain)
        codes, affine = ours.kv_write(x[:, None], 4)
        return (
            gated,
            normed,
            ours.hadamard(x, None),
            ours.attention_kv(x[:, None], codes, affine, codes, affine, None, 0.3, 4, 4),
        )


def fused(graph: Graph, numerics: str = "exact") -> Program:
    return program_of(graph, recipe=Recipe.load("none").with_overrides([f"numerics={numerics}"]), stage="fused")


def test_golden(apply: Apply) -> None:
    graph = traced(Normed(), TOKENS)
    assert apply(fused(graph), WidenSums())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 6]
# norm
%1 = aten::to.dtype(%0, f64) : f64[B, S0, 6]
@norm.weight : f32[6]
%2 = aten::to.dtype(@norm.weight, f64) : f64[6]
@norm.bias : f32[6]
%3 = aten::to.dtype(@norm.bias, f64) : f64[6]
%4 = aten::layer_norm(%1, [6], %2, %3, 1e-05, False) : f64[B, S0, 6]
%5 = aten::to.dtype(%4, f32) : f32[B, S0, 6]
# top
%6 = aten::to.dtype(%5, f64) : f64[B, S0, 6]
%7 = aten::sigmoid(%6) : f64[B, S0, 6]
%8 = aten::to.dtype(%7, f32) : f32[B, S0, 6]
%9 = aten::mul.Tensor(%5, %8) : f32[B, S0, 6]
%10 = qpcompile::quantize_dynamic(%9, 0, 1.0, 4) : (i8[B, S0, 6], f32[B, S0, 1])
%11 = operator.getitem(%10, 0) : i8[B, S0, 6]
return y = %11
""",
    )


def test_numbers(apply: Apply) -> None:
    graph = traced(Normed(), TOKENS)
    reference, _ = torch.ops.qpcompile.quantize_dynamic(
        Normed(plain=True).double()(TOKENS["x"].double()).float(), 0, 1.0, 4
    )
    expected = run(graph, **TOKENS)["y"]
    assert apply(fused(graph), WidenSums())
    found = run(graph, **TOKENS)["y"]
    assert torch.equal(found, expected) and torch.equal(found, reference)


def test_patches_are_widened(apply: Apply) -> None:
    pictures = {"x": torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))}
    graph = traced(Patches(4), pictures)
    expected = run(graph, **pictures)["y"]
    assert apply(fused(graph), WidenSums())
    assert wide(graph) == 1
    assert relative(run(graph, **pictures)["y"], expected) < 1e-6


def test_overlapping_patches_are_not(apply: Apply) -> None:
    graph = traced(Patches(2), {"x": torch.randn(2, 3, 8, 12)})
    assert not apply(fused(graph), WidenSums())


def test_operators_of_ours_read_float64(apply: Apply) -> None:
    graph = traced(Ours(), TOKENS, ("gated", "normed", "turned", "attended"))
    expected = run(graph, **TOKENS)
    assert apply(fused(graph), WidenSums())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 6]
# top
%1 = aten::to.dtype(%0, f64) : f64[B, S0, 6]
%2 = qpcompile::activation_quantize(%1, %1, 'silu', None, True, None, None, None, 0, 1.0, 4) : (i8[B, S0, 6], f32[B, S0, 1])
%3 = operator.getitem(%2, 0) : i8[B, S0, 6]
@weight : f32[6]
%4 = qpcompile::rmsnorm_quantize(%1, @weight, 1e-05, None, True, None, None, None, 0, 1.0, 4) : (i8[B, S0, 6], f32[B, S0, 1])
%5 = operator.getitem(%4, 0) : i8[B, S0, 6]
%6 = aten::slice.Tensor(%0, 0, 0, end) : f32[B, S0, 6]
%7 = aten::unsqueeze(%6, 1) : f32[B, 1, S0, 6]
%8 = qpcompile::kv_write(%7, 4) : (u8[B, 1, S0, 3], f32[B, 1, S0, 2])
%9 = operator.getitem(%8, 0) : u8[B, 1, S0, 3]
%10 = operator.getitem(%8, 1) : f32[B, 1, S0, 2]
%11 = qpcompile::hadamard(%1, None) : f64[B, S0, 6]
%12 = aten::to.dtype(%11, f32) : f32[B, S0, 6]
%13 = aten::slice.Tensor(%0, 0, 0, end) : f32[B, S0, 6]
%14 = aten::unsqueeze(%13, 1) : f32[B, 1, S0, 6]
%15 = aten::to.dtype(%14, f64) : f64[B, 1, S0, 6]
%16 = qpcompile::attention_kv(%15, %9, %10, %9, %10, None, 0.3, 4, 4) : f64[B, 1, S0, 6]
%17 = aten::to.dtype(%16, f32) : f32[B, 1, S0, 6]
return gated = %3
return normed = %5
return turned = %12
return attended = %17
""",  # noqa: E501
    )
    found = run(graph, **TOKENS)
    for name in ("gated", "normed"):
        assert (found[name].int() - expected[name].int()).abs().max() <= 1
    for name in ("turned", "attended"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(found["turned"], hadamard(TOKENS["x"].double()).float())


def test_fast_graphs_stay(apply: Apply) -> None:
    for module in (Normed(), Normed(plain=True), Patches(4)):
        inputs = {"x": torch.randn(2, 3, 8, 12)} if isinstance(module, Patches) else TOKENS
        graph = traced(module, inputs)
        assert not apply(fused(graph, "fast"), WidenSums())
        assert "f64" not in graph_text(graph)


def test_what_is_not_quantized_is_widened_too(apply: Apply) -> None:
    graph = traced(Normed(plain=True), TOKENS)
    assert apply(fused(graph), WidenSums()) and wide(graph) == 2


def test_plain_arithmetic_stays(apply: Apply) -> None:
    assert not apply(fused(traced(Plain(), TOKENS)), WidenSums())


def test_half_precision_and_gpus_are_refused() -> None:
    for tensor, said in ((torch.ones(1).bfloat16(), "in bfloat16"), (torch.ones(1, device="meta"), "on meta")):
        program = fused(traced(Normed(), TOKENS))
        program.host.register_parameter("held", nn.Parameter(tensor))
        with pytest.raises(RecipeError, match=f"this model is {said}") as caught:
            run_passes(program, [WidenSums()])
        assert caught.value.do and "numerics: fast" in caught.value.do
    with pytest.raises(RecipeError, match="on meta"):
        move(fused(traced(Normed(), TOKENS)), torch.device("meta"))


def test_a_compile_refuses_before_it_starts() -> None:
    model, cases = llava()
    recipe = Recipe.load("quota-30").with_overrides(["numerics=exact"])
    with pytest.raises(RecipeError, match=r"numerics: exact sums in float64 .* this model is in bfloat16"):
        qpcompile.compile(model.bfloat16(), recipe, calibration=[cases["one"]])


def test_the_head_stays(apply: Apply) -> None:
    head = traced(nn.Sequential(nn.Linear(WIDTH, 3)), {"input": TOKENS["x"]}, name=HEAD)
    program = fused(traced(Normed(), TOKENS))
    program.graphs[HEAD] = head
    assert apply(program, WidenSums())
    assert not wide(head) and list(calls(head, aten.linear.default))


def test_broken_stage_order_is_named() -> None:
    program = program_of(traced(Normed(), TOKENS), stage="quantized")
    with pytest.raises(InvariantError, match="widen_sums runs at the stage fused, the program is quantized"):
        run_passes(program, [WidenSums()])
