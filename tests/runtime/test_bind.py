"""Bound graphs are bit-identical, unpack a weight at most once, and do not change the program."""

from __future__ import annotations

import pytest
import torch
from programs import program_of, run, traced
from torch import Tensor, nn
from torch.fx import GraphModule

from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.program import DECODE, PREFILL
from qpcompile.ir.text import graph_text
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.native import library as native
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.cpu.tape import TapedDecode

TOKENS = {"x": torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))}


class Quantized(nn.Module):
    """A norm, a rotation and two linears, one of them with an odd number of inputs, one with a bias."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("gain", torch.rand(9) + 0.5)
        self.register_buffer("first", pack_int4(torch.randint(-8, 8, (12, 9)).to(torch.int8)))
        self.register_buffer("second", pack_int4(torch.randint(-8, 8, (9, 12)).to(torch.int8)))
        self.register_buffer("scale", torch.rand(12, 1))
        self.register_buffer("bias", torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        ours = torch.ops.qpcompile
        q, step = ours.rmsnorm_quantize(x, self.gain, 1e-6, None, True, None, None, None, 0, 1.0, 4)
        y = ours.linear_int(q, step, self.first, self.scale, None, torch.float32, 4)
        q, step = ours.quantize_dynamic(ours.hadamard(y, None), 0, 1.0, 4)
        return x + ours.linear_int(q, step, self.second, self.scale[:9], self.bias, torch.float32, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
def test_same_bits_and_shared_weights(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and not native.available():
        pytest.skip(native.library().problem)
    if not compiled:
        nothing = native.Library(None, "left out by this test", 0, False, False, {})
        monkeypatch.setattr(native, "library", lambda: nothing)
    module = Quantized()
    program = program_of(traced(module, TOKENS, name=PREFILL), traced(module, TOKENS, name=DECODE))
    prefill, before = program.graphs[PREFILL], graph_text(program.graphs[PREFILL])
    expected = run(prefill, **TOKENS)["y"]
    bound = BoundGraphs(program)
    assert torch.equal(bound(prefill, TOKENS)["y"], expected)
    assert graph_text(prefill) == before and len(list(calls(prefill, LINEAR_INT))) == 2
    made, decode = bound.modules[PREFILL], bound.modules[DECODE]
    assert isinstance(made, GraphModule) and isinstance(decode, TapedDecode)
    assert not [node for node in made.graph.nodes if str(node.target).startswith("qpcompile.")]
    if compiled:
        assert get_tensor(made, "first") is module.first
        return
    codes = get_tensor(made, "first_codes")
    assert codes.dtype == torch.int8 and codes is get_tensor(decode.module, "first_codes")
