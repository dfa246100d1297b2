"""Rotary embeddings and residual adds are fused, bit for bit in float32; near misses are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import program_of, relative, run, traced
from torch import Tensor, nn
from toy_decoder import HIDDEN

from qpcompile.ir.edit import calls
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.operators import LINEAR_INT, ROPE
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.fuse_kernels import FuseKernels

Apply = Callable[[Program, FuseKernels], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


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


class Residual(nn.Module):
    """A linear on codes, and `add` of its input and its result."""

    scale: Tensor

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.register_buffer("weight", pack_int4(torch.randint(-8, 8, (8, 8)).to(torch.int8)))
        self.register_buffer("scale", torch.rand(8, 1))
        self.register_buffer("bias", torch.rand(8) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        q, step = torch.ops.qpcompile.quantize_dynamic(x, 0, 1.0, 4)
        return self.add(x, torch.ops.qpcompile.linear_int(q, step, self.weight, self.scale, self.bias, x.dtype, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [lambda x, y: x + y, lambda x, y: y + x], ids=["after", "before"])
def test_a_residual_is_added_in_the_epilogue(
    apply: Apply, add: Callable[[Tensor, Tensor], Tensor], bias: bool, dtype: torch.dtype
) -> None:
    feeds = {"x": TOKENS["x"].to(dtype)}
    graph = traced(Residual(add, bias), feeds)
    program = program_of(graph, stage="quantized")
    expected = run(graph, **feeds)["y"]
    assert apply(program, FuseKernels())
    assert not list(calls(graph, torch.ops.aten.add.Tensor)) and len(list(calls(graph, LINEAR_INT))) == 1
    assert torch.equal(run(graph, **feeds)["y"], expected)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda x, y: torch.add(x, y, alpha=2), ""),
        (lambda x, y: x[:1] + y, "adds something other than a tensor of the same type and sizes"),
        (lambda x, y: x.double() + y, "adds something other than a tensor of the same type and sizes"),
        (lambda x, y: x + y + torch.relu(y), "has another reader"),
        (lambda x, y: y + 1.0, "adds something other than a tensor of the same type and sizes"),
    ],
    ids=["weighed", "broadcast", "wider", "read twice", "number"],
)
def test_other_sums_stay(apply: Apply, add: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    graph = traced(Residual(add), TOKENS)
    program = program_of(graph)
    Canonicalize().run(program)
    program.stage = "quantized"
    assert not apply(program, FuseKernels())
    reasons = [miss.reason for miss in program.measured[NEAR_MISSES]]
    assert len(reasons) == 1 and reasons[0].endswith(reason) if reason else not reasons
