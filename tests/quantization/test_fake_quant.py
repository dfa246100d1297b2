"""Simulated quantization uses the weights that are deployed."""

from __future__ import annotations

import torch
from programs import captured, changed_recipe, fresh

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.edit import aten, calls, get_tensor
from qpcompile.ir.node_facts import StubFact, stub_fact
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import PREFILL
from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.kernels.quantize_dynamic.reference import dequantize, quantize_dynamic
from qpcompile.pass_list import passes
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.fake_quant import StubRounding


def test_weights_are_the_solved_ones() -> None:
    _, cases, _ = captured()
    program = fresh(changed_recipe("w4a4kv4"))
    listed = passes([cases["one"], cases["longer"]], 2)
    names = [item.name for item in listed]
    run_passes(program, listed[: names.index("measure_sensitivity")])
    rounding, graph = StubRounding.of(program), program.graphs[PREFILL]
    assert rounding is not None and program.measured[CALIBRATION].inputs
    found: dict[str, torch.Tensor] = {}
    for linear in calls(graph, aten.linear.default):
        stub = linear.args[1]
        assert not isinstance(stub, (int, float))
        fact: StubFact | None = stub_fact(stub)  # type: ignore[arg-type]
        assert fact is not None
        weight = get_tensor(graph.module, weight_name(linear)).detach()
        found[weight_name(linear)] = rounding(weight, fact)
        assert rounding(weight, fact) is found[weight_name(linear)], "kept, since the model is small"
        assert not torch.equal(found[weight_name(linear)], dequantize(*quantize_dynamic(weight, 0, 1.0, 4)))
    run_passes(program, listed[names.index("measure_sensitivity") : names.index("quantize_weights") + 1])
    graph = program.graphs[PREFILL]
    for name, value in found.items():
        codes = codes_of(get_tensor(graph.module, f"{name}_packed"), value.shape[1])
        assert torch.equal(value, codes.float() * get_tensor(graph.module, f"{name}_scale"))
