"""Rotary embedding, rotation and writes of an attention become one operator, with the append in decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import program_of, run, traced
from torch import Tensor, nn

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.operators import ATTENTION_STEP, HADAMARD, KV_WRITE, ROPE, ROPE_KV_APPEND, ROPE_KV_WRITE, ours
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.passes.fuse_cache_writes import FuseCacheWrites
from qpcompile.passes.widen_sums import WidenSums
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.cuda.static_graph import static_graph

Apply = Callable[[Program, FuseCacheWrites], bool]
SIZE, HEADS, GROUPS = 8, 4, 2
PART = ("codes", "affine")
CACHE = tuple(f"past_key_values.0.{part}.{kind}" for part in ("key", "value") for kind in PART)


class Attention(nn.Module):
    """Attention of 4 query heads on 2 key heads; `kind` names what differs from the pattern."""

    def __init__(self, kind: str = "", size: int = SIZE, bits: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        self.kind, self.size, self.bits = kind, size, bits

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, key: bool) -> Tensor:
        if self.kind in ("nothing", "no rope") or (self.kind == "other tables" and key):
            y = x if self.kind != "other tables" else ours.rope(x, sin, cos)
        else:
            y = ours.rope(x, cos, sin)
        plain = self.kind in ("nothing", "no rotation") or (self.kind == "one rotation" and key)
        return y if plain else ours.hadamard(y, None)

    def quantized(self, y: Tensor) -> Tensor:
        """The values of the codes of a token's heads."""
        rows = y.transpose(1, 2).contiguous().flatten(2) if self.kind != "quantized heads" else y
        if self.kind == "quantized plain":
            codes, step = ours.quantize_dynamic(rows, 0, 0.9, 4)
        else:
            codes, step = ours.transform_quantize(rows, None, True, None, None, None, 0, 0.9, 4)
        y = codes * step
        return y + rows if self.kind == "quantized and read" else y

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        heads = x.unflatten(-1, (HEADS + 2 * GROUPS, self.size)).transpose(1, 2)
        tables = [each.unsqueeze(1) for each in (cos, sin)]
        if self.kind == "tables of heads":
            tables = [each.expand(-1, GROUPS, -1, -1) for each in tables]
        query = (
            self.turned(heads[:, :HEADS], *tables, key=False) if self.kind != "tables of heads" else heads[:, :HEADS]
        )
        key, value = self.turned(heads[:, HEADS:-GROUPS], *tables, key=True), heads[:, -GROUPS:]
        if self.kind == "tables of heads":
            query = ours.hadamard(ours.rope(query[:, :GROUPS], *tables), None)
        if self.kind == "wide values":
            value = torch.cat([value, value], -1)
        new = [*ours.kv_write(key, self.bits[0]), *ours.kv_write(value, self.bits[1])]
        parts = [torch.cat([old, each], 2) for old, each in zip(past, new, strict=True)] if past else new
        y = ours.attention_kv(query, *parts, None, 0.3, *self.bits) if self.kind != "wide values" else query
        if self.kind == "key read twice":
            return y, key, *parts[:3]
        if self.kind.startswith("quantized"):
            return self.quantized(y), *parts
        return y, *parts


def fused(
    kind: str = "", past: int = 0, size: int = SIZE, bits: tuple[int, int] = (4, 4)
) -> tuple[Graph, Program, dict[str, Tensor]]:
    """The graph of `Attention`, on `past` tokens, and feeds for it."""
    made = torch.Generator().manual_seed(3)
    tokens = 1 if past else 5
    feeds = {"x": torch.randn(2, tokens, (HEADS + 2 * GROUPS) * size, generator=made)}
    feeds |= dict(zip(("cos", "sin"), torch.randn(2, 2, tokens, size, generator=made), strict=True))
    if past:
        parts = [part for each in bits for part in kv_write(torch.randn(2, GROUPS, past, size, generator=made), each)]
        feeds |= dict(zip(CACHE, parts, strict=True))
    axes = dict.fromkeys(CACHE, (0, 2)) | dict.fromkeys(("x", "cos", "sin"), (0,) if past else (0, 1))
    named = {path.replace(".", "_"): each for path, each in feeds.items()}
    if not past:
        graph = traced(Attention(kind, size, bits), feeds, ("y", "a", "b", "c", "d"), PREFILL, axes)
        return graph, program_of(graph, stage="fused"), named
    # Prefill must return the cache that decode takes.
    prefill = traced(
        Attention(kind, size, bits), {name: feeds[name] for name in ("x", "cos", "sin")}, ("y", *CACHE), PREFILL
    )
    graph = traced(_Named(Attention(kind, size, bits)), feeds, ("y", *CACHE), DECODE, axes)
    return graph, program_of(graph, prefill, stage="fused"), named


class _Named(nn.Module):
    """Decode with the names of its caches."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key_values_0_key_codes: Tensor,
        past_key_values_0_key_affine: Tensor,
        past_key_values_0_value_codes: Tensor,
        past_key_values_0_value_affine: Tensor,
    ) -> tuple[Tensor, ...]:
        keys = past_key_values_0_key_codes, past_key_values_0_key_affine
        past = *keys, past_key_values_0_value_codes, past_key_values_0_value_affine
        for part in past[1:]:
            torch._check(part.shape[2] == past[0].shape[2])
        return self.attention(x, cos, sin, *past)


def counts(graph: Graph) -> tuple[int, ...]:
    """Of the operators that are fused: rope, hadamard, kv_write and cat."""
    return tuple(len(list(calls(graph, each))) for each in (ROPE, HADAMARD, KV_WRITE, aten.cat.default))


def test_golden(apply: Apply) -> None:
    graph, program, _ = fused(past=6)
    assert apply(program, FuseCacheWrites())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph decode of model
%0 = input x : f32[B, 1, 64]
%1 = input cos : f32[S0, 1, 8]
%2 = input sin : f32[S1, 1, 8]
%3 = input past_key_values.0.key.codes : u8[B, 2, S2, 4]
%4 = input past_key_values.0.key.affine : f32[B, 2, S2, 2]
%5 = input past_key_values.0.value.codes : u8[B, 2, S2, 4]
%6 = input past_key_values.0.value.affine : f32[B, 2, S2, 2]
# attention
%7 = aten::unflatten.int(%0, -1, [8, 8]) : f32[B, 1, 8, 8]
%8 = aten::transpose.int(%7, 1, 2) : f32[B, 8, 1, 8]
%9 = aten::unsqueeze(%1, 1) : f32[S0, 1, 1, 8]
%10 = aten::unsqueeze(%2, 1) : f32[S1, 1, 1, 8]
%11 = aten::slice.Tensor(%8, 0, 0, end) : f32[B, 8, 1, 8]
%12 = aten::slice.Tensor(%11, 1, 0, 4) : f32[B, 4, 1, 8]
%13 = aten::slice.Tensor(%8, 0, 0, end) : f32[B, 8, 1, 8]
%14 = aten::slice.Tensor(%13, 1, 4, -2) : f32[B, 2, 1, 8]
%15 = aten::slice.Tensor(%8, 0, 0, end) : f32[B, 8, 1, 8]
%16 = aten::slice.Tensor(%15, 1, -2, end) : f32[B, 2, 1, 8]
%17 = qpcompile::rope_kv_append(%12, %14, %16, %9, %10, True, 4, 4, %3, %4, %5, %6) : (f32[B, 4, 1, 8], u8[B, 2, S2+1, 4], f32[B, 2, S2+1, 2], u8[B, 2, S2+1, 4], f32[B, 2, S2+1, 2])
%18 = operator.getitem(%17, 0) : f32[B, 4, 1, 8]
%19 = operator.getitem(%17, 1) : u8[B, 2, S2+1, 4]
%20 = operator.getitem(%17, 2) : f32[B, 2, S2+1, 2]
%21 = operator.getitem(%17, 3) : u8[B, 2, S2+1, 4]
%22 = operator.getitem(%17, 4) : f32[B, 2, S2+1, 2]
%23 = qpcompile::attention_kv(%18, %19, %20, %21, %22, None, 0.3, 4, 4) : f32[B, 4, 1, 8]
return y = %23
return past_key_values.0.key.codes = %19
return past_key_values.0.key.affine = %20
return past_key_values.0.value.codes = %21
return past_key_values.0.value.affine = %22
""",  # noqa: E501
    )


@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize("kind", ["", "no rope", "no rotation"])
def test_numbers(apply: Apply, kind: str, past: int) -> None:
    graph, program, feeds = fused(kind, past)
    before = run(graph, **feeds)
    assert apply(program, FuseCacheWrites())
    assert counts(graph) == (0, 0, 0, 0) and program.measured[NEAR_MISSES] == ()
    assert len(list(calls(graph, ROPE_KV_APPEND if past else ROPE_KV_WRITE))) == 1
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("past", [0, 6])
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 8)], ids=str)
def test_other_bits(apply: Apply, bits: tuple[int, int], past: int) -> None:
    graph, program, feeds = fused(past=past, bits=bits)
    before = run(graph, **feeds)
    assert apply(program, FuseCacheWrites())
    assert counts(graph) == (0, 0, 0, 0) and program.measured[NEAR_MISSES] == ()
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bound_and_static_graphs_append_in_place(apply: Apply) -> None:
    graph, program, feeds = fused(past=6)
    before = run(graph, **feeds)
    apply(program, FuseCacheWrites())
    named = {str(path): feeds[path.replace(".", "_")] for path in graph.inputs}
    bound = BoundGraphs(program)
    found = bound(graph, named)
    assert all(torch.equal(before[name], found[name]) for name in before)
    text = str(static_graph(graph).module.code)
    assert text.count("write_token") >= 4 and "append" not in text


@pytest.mark.parametrize("kind", ["quantized", "quantized plain"])
@pytest.mark.parametrize("past", [1, 6])
def test_a_step_is_one_operator(apply: Apply, kind: str, past: int) -> None:
    graph, program, feeds = fused(kind, past)
    before = run(graph, **feeds)
    assert apply(program, FuseCacheWrites())
    found = [node for node in graph.nodes if str(node.target).startswith("qpcompile.")]
    (step,) = found
    assert step.target is ATTENTION_STEP and program.measured[NEAR_MISSES] == ()
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)
    named = {str(path): feeds[path.replace(".", "_")] for path in graph.inputs}
    bound = BoundGraphs(program)(graph, named)
    assert all(torch.equal(before[name], bound[name]) for name in before)
    assert str(static_graph(graph).module.code).count("write_token") >= 4


def test_exact_steps_are_bound_bit_for_bit(apply: Apply) -> None:
    graph, program, feeds = fused("quantized", 6)
    apply(program, FuseCacheWrites())
    program.recipe = program.recipe.with_overrides(["numerics=exact"])
    run_passes(program, [WidenSums()])
    assert [node.args[0].target for node in calls(graph, ATTENTION_STEP)] == [aten.to.dtype]  # type: ignore[union-attr]
    named = {str(path): feeds[path.replace(".", "_")] for path in graph.inputs}
    expected, found = run(graph, **feeds), BoundGraphs(program)(graph, named)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", ["quantized and read", "quantized heads"])
def test_other_steps_stay_apart(apply: Apply, kind: str) -> None:
    graph, program, feeds = fused(kind, 6)
    before = run(graph, **feeds)
    assert apply(program, FuseCacheWrites())
    assert not list(calls(graph, ATTENTION_STEP)) and len(list(calls(graph, ROPE_KV_APPEND))) == 1
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_prompt_is_no_step(apply: Apply) -> None:
    graph, program, _ = fused("quantized")
    assert apply(program, FuseCacheWrites())
    assert not list(calls(graph, ATTENTION_STEP)) and len(list(calls(graph, ROPE_KV_WRITE))) == 1


NEAR = {
    "nothing": (1, "are neither rotated nor embedded with the same tables"),
    "one rotation": (1, "is rotated"),
    "key read twice": (1, "has another reader"),
    "tables of heads": (1, "is not a table [B, 1, S, D] for all heads"),
}


@pytest.mark.parametrize("kind", NEAR)
def test_near_misses_say_why(apply: Apply, kind: str) -> None:
    graph, program, feeds = fused(kind)
    before, text = run(graph, **feeds), graph_text(graph)
    assert not apply(program, FuseCacheWrites()) and graph_text(graph) == text
    (miss,) = program.measured[NEAR_MISSES]
    assert miss.reason.endswith(NEAR[kind][1])
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_odd_heads_stay(apply: Apply) -> None:
    graph, program, _ = fused("no rope", size=7)
    assert not apply(program, FuseCacheWrites())
    assert "equal and even numbers are fused" in program.measured[NEAR_MISSES][0].reason
    assert counts(graph)[1:3] == (2, 2)


def test_other_tables_keep_their_embeddings(apply: Apply) -> None:
    """Only the rotation and the writes are fused where queries and keys have tables of their own."""
    graph, program, feeds = fused("other tables")
    before = run(graph, **feeds)
    assert apply(program, FuseCacheWrites())
    assert counts(graph) == (2, 0, 0, 0)
    after = run(graph, **feeds)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_to_do(apply: Apply) -> None:
    program = program_of(stage="fused")
    assert not apply(program, FuseCacheWrites())


def test_refusal(apply: Apply) -> None:
    graph, program, _ = fused()
    program.stage = "quantized"
    with pytest.raises(InvariantError, match="fuse_cache_writes runs at the stage fused, the program is quantized"):
        run_passes(program, [FuseCacheWrites()])
    program.stage = "fused"
    apply(program, FuseCacheWrites())
    node: Any = next(calls(graph, ROPE_KV_WRITE))
    node.update_arg(1, node.args[0])
    with pytest.raises(InvariantError, match="operand v"):
        verify(program)
