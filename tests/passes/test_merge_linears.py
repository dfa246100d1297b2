"""Linears on the same codes become one product and views of it; others stay apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import expecttest
import pytest
import torch
from programs import changed_recipe, program_of, run, stubbed, traced
from torch import Tensor, nn
from toy_decoder import HIDDEN, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import InvariantError
from qpcompile.ir.code_bits import BITS, other_bits
from qpcompile.ir.edit import add_tensor, aten, calls, get_tensor
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.node_facts import QuantizedFact, quantized_fact, set_fact
from qpcompile.ir.operators import LINEAR_INT, ours
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.fuse_kernels import FuseKernels
from qpcompile.passes.merge_linears import MergeLinears
from qpcompile.passes.quantize_kv_cache import QuantizeKvCache
from qpcompile.passes.quantize_weights import QuantizeWeights

Apply = Callable[[Program, MergeLinears], bool]
PLAIN = ("quantize.ignore=[]", "quantize.center=null", "quantize.transform=hadamard")
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


class Linears(nn.Module):
    """Linears of the given widths on the same codes; sizes of groups of their weights and types of biases."""

    def __init__(
        self,
        widths: Sequence[int],
        groups: Sequence[int] = (1, 1, 1),
        biases: Sequence[torch.dtype | None] = (None,) * 3,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Module() for _ in widths)
        for part, width, group, bias in zip(self.parts, widths, groups, biases, strict=True):
            codes = torch.randint(-8, 8, (width, HIDDEN), dtype=torch.int8)
            part.register_buffer("weight", pack_int4(codes))
            part.register_buffer("scale", torch.rand(width, group))
            part.register_buffer("bias", None if bias is None else torch.randn(width).to(bias))

    def product(self, codes: tuple[Tensor, Tensor], index: int, residual: Tensor | None = None) -> Tensor:
        part: Any = self.parts[index]
        return ours.linear_int(*codes, part.weight, part.scale, part.bias, torch.float32, 4, residual)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes = ours.quantize_dynamic(x, 0, 1.0, 4)
        return tuple(self.product(codes, index).relu() for index in range(len(self.parts)))


class WithResidual(Linears):
    """The last one has a residual in its epilogue."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes = ours.quantize_dynamic(x, 0, 1.0, 4)
        return self.product(codes, 0), self.product(codes, 1), self.product(codes, 2, x)


class Apart(Linears):
    """Each on codes of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.product(ours.quantize_dynamic(x * each, 0, 1.0, 4), each) for each in range(3))


class ReadAgain(Linears):
    """The second weight is read by something else too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second, third = super().forward(x)
        part: Any = self.parts[1]
        return first, second + part.scale[0], third


class Joined(Linears):
    """One result is viewed as rows of all channels of two tokens: no slice can be."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes = ours.quantize_dynamic(x, 0, 1.0, 4)
        first, second = self.product(codes, 0), self.product(codes, 1)
        return first.view(2, -1), second.unflatten(-1, (2, -1)).transpose(1, 2), self.product(codes, 2)


def fused(module: nn.Module) -> tuple[Graph, Program]:
    graph = traced(module, TOKENS, ("a", "b", "c"), axes={"x": ()})
    return graph, program_of(graph, stage="fused")


def linears(graph: Graph) -> int:
    return len(list(calls(graph, LINEAR_INT)))


def test_a_product_promises_the_bits_of_its_quantizer() -> None:
    graph, _ = fused(Linears((4, 6, 5)))
    assert list(other_bits(graph)) == []
    product, *_ = calls(graph, LINEAR_INT)
    product.update_arg(BITS, 8)
    (problem,) = other_bits(graph)
    assert problem.startswith(f"{product.name} takes codes of 8 bits, ") and problem.endswith(" makes them of 4")


def test_golden(apply: Apply) -> None:
    graph, program = fused(Linears((8, 4, 6), biases=(torch.float32,) * 3))
    assert apply(program, MergeLinears())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[2, 5, 8]
# top
%1 = qpcompile::quantize_dynamic(%0, 0, 1.0, 4) : (i8[2, 5, 8], f32[2, 5, 1])
%2 = operator.getitem(%1, 0) : i8[2, 5, 8]
%3 = operator.getitem(%1, 1) : f32[2, 5, 1]
@parts.0_1_2.weight : u8[18, 4]
@parts.0_1_2.scale : f32[18, 1]
@parts.0_1_2.bias : f32[18]
%4 = qpcompile::linear_int(%2, %3, @parts.0_1_2.weight, @parts.0_1_2.scale, @parts.0_1_2.bias, f32, 4) : f32[2, 5, 18]
%5 = aten::slice.Tensor(%4, 2, 0, 8) : f32[2, 5, 8]
%6 = aten::relu(%5) : f32[2, 5, 8]
%7 = aten::slice.Tensor(%4, 2, 8, 12) : f32[2, 5, 4]
%8 = aten::relu(%7) : f32[2, 5, 4]
%9 = aten::slice.Tensor(%4, 2, 12, 18) : f32[2, 5, 6]
%10 = aten::relu(%9) : f32[2, 5, 6]
return a = %6
return b = %8
return c = %10
""",
    )


@pytest.mark.parametrize(
    "module", [Linears((8, 4, 6)), Linears((3, 5, 1), (4, 4, 4)), Joined((8, 4, 6))], ids=["plain", "groups", "joined"]
)
def test_numbers(apply: Apply, module: Linears) -> None:
    graph, program = fused(module)
    before = run(graph, **TOKENS)
    assert apply(program, MergeLinears())
    assert linears(graph) == 1
    after = run(graph, **TOKENS)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_view_that_joins_channels_becomes_a_copy(apply: Apply) -> None:
    graph, program = fused(Joined((8, 4, 6)))
    apply(program, MergeLinears())
    assert len(list(calls(graph, aten.reshape.default))) == 1 and len(list(calls(graph, aten.view.default))) <= 1


NEAR = {
    "residual": (WithResidual((8, 4, 8)), 2, "reads the codes of a linear that adds a residual, or adds one"),
    "groups": (Linears((8, 4, 6), (1, 1, 2)), 2, "has other groups of inputs than the first linear on the same codes"),
    "biases": (
        Linears((8, 4, 6), biases=(torch.float32, torch.float32, torch.bfloat16)),
        2,
        "has a bias of another type, or none than the first linear on the same codes",
    ),
    "all of them": (
        Linears((8, 4, 6), (1, 2, 4)),
        3,
        "has other groups of inputs than the first linear on the same codes",
    ),
    "other reader": (
        ReadAgain((8, 4, 6)),
        3,
        "something else reads one of the weights, or other linears share them in another graph",
    ),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_say_why(apply: Apply, case: str) -> None:
    module, count, reason = NEAR[case]
    graph, program = fused(module)
    before = run(graph, **TOKENS)
    assert apply(program, MergeLinears()) == (count < 3)
    assert linears(graph) == count
    assert {
        miss.reason.split(" ", 1)[1] if case != "other reader" else miss.reason
        for miss in program.measured[NEAR_MISSES]
    } == {reason}
    after = run(graph, **TOKENS)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_to_do(apply: Apply) -> None:
    graph, program = fused(Apart((8, 4, 6)))
    assert not apply(program, MergeLinears())
    assert linears(graph) == 3 and program.measured[NEAR_MISSES] == ()


def test_tied_weights_stay(apply: Apply) -> None:
    """The same weight twice in one set, and in two sets of which one differs."""
    module = Linears((8, 8, 8))
    for part in module.parts[1:]:
        part.weight = module.parts[0].weight  # type: ignore[union-attr]
    graph, program = fused(module)
    assert not apply(program, MergeLinears())
    assert linears(graph) == 3


def test_prefill_and_decode_share_the_merged_weight(apply: Apply) -> None:
    program = stubbed(prefill_graph(), decode_graph(), recipe=changed_recipe("w4a4kv4", *PLAIN), layers=2)
    run_passes(program, [FoldTransforms(), QuantizeWeights(), QuantizeKvCache(), FuseKernels()])
    prefill, decode = (program.graphs[name] for name in (PREFILL, DECODE))
    feeds, sites = toy_feeds(2, 5), program.plan.sites
    before = run(prefill, **feeds)
    assert apply(program, MergeLinears())
    after = run(prefill, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [linears(graph) for graph in (prefill, decode)] == [4, 4] and program.plan.sites == sites
    name = "layers.1.self_attn.q_proj_k_proj_v_proj.weight_packed"
    assert get_tensor(prefill.module, name) is get_tensor(decode.module, name)
    for graph in (prefill, decode):
        assert not [key for key, _ in graph.module.named_buffers() if ".q_proj." in key or ".v_proj." in key]
    fact = next(fact for node in calls(decode, LINEAR_INT) if (fact := quantized_fact(node)) is not None)
    assert [site.split(".")[-1] for site in fact.sites] == ["q_proj", "k_proj", "v_proj"]


def test_sites_of_the_parts_are_kept(apply: Apply) -> None:
    graph, program = fused(Linears((8, 4, 6)))
    for index, node in enumerate(calls(graph, LINEAR_INT)):
        set_fact(node, QuantizedFact((f"site {index}",), "reference"))
    apply(program, MergeLinears())
    (node,) = calls(graph, LINEAR_INT)
    assert quantized_fact(node) == QuantizedFact(("site 0", "site 1", "site 2"), "reference")


def test_refusal() -> None:
    graph, program = fused(Linears((8, 4, 6)))
    program.stage = "quantized"
    with pytest.raises(InvariantError, match="merge_linears runs at the stage fused, the program is quantized"):
        run_passes(program, [MergeLinears()])
    program.stage = "fused"
    node = next(calls(graph, LINEAR_INT))
    node.update_arg(3, add_tensor(graph, "short", torch.ones(3, 1), node))
    with pytest.raises(InvariantError, match="operand weight_scale"):
        verify(program)
