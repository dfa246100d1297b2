"""Activations and gates in C: tabulated for bfloat16, and rounded where graphs that spell them out round."""

from __future__ import annotations

import pytest
import torch

from qpcompile.kernels.hadamard import reference as hadamard
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import GATES, Kind, RowPlan
from qpcompile.kernels.quantize_dynamic import reference as quantize

pytestmark = pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
LEVELS = range(native.library().level + 1)
levels = pytest.mark.parametrize("level", LEVELS, ids=[native.LEVELS[level] for level in LEVELS])


@pytest.mark.parametrize("as_graph", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_many_rows_are_those_of_one(kind: Kind, as_graph: bool) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(16, 4096)
    second = None if kind.startswith(("sigmoid", "gelu_")) else torch.randn(4096).bfloat16().expand(16, -1)
    plan = RowPlan(kind, torch.bfloat16, 4096, constant=1.702, as_graph=as_graph)
    found = plan.stored(every, second)
    for row in range(16):
        one = plan.stored(every[row : row + 1], None if second is None else second[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], one, rtol=0, atol=0, equal_nan=True)


@levels
def test_what_graphs_spell_out_rounds_where_they_do(level: int) -> None:
    gate, up = torch.randn(2, 9, 100)
    wide = gate.double()
    product = torch.nn.functional.silu(wide).float() * up
    soft = gate * torch.sigmoid((gate * 1.702).double()).float()
    cases: list[tuple[Kind, tuple[torch.Tensor, ...], torch.Tensor]] = [
        ("silu_then_mul", (gate, up), product),
        ("sigmoid_mul", (gate,), soft),
    ]
    for kind, sources, expected in cases:
        plans = [RowPlan(kind, dtype, 100, constant=1.702, level=level) for dtype in (torch.float64, torch.float32)]
        assert torch.equal(plans[0].stored(*(each.double() for each in sources)).float(), expected)
        torch.testing.assert_close(plans[1].stored(*sources), expected, rtol=1e-6, atol=1e-7)
    shift = torch.randn(100)
    found = RowPlan("plain", torch.float64, 100, shift=shift, factors=True, level=level).quantized(wide)
    expected = quantize.quantize_dynamic(hadamard.hadamard(wide).float() - shift)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
