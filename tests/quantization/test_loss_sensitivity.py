"""The cost of output errors, against the divergence that perturbed outputs cause."""

from __future__ import annotations

from typing import Any

import torch
from programs import captured, changed_recipe, fresh
from torch import fx

from qpcompile.ir.edit import aten, is_call
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.quantization.loss_sensitivity import loss_sensitivity
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement

SITES = [f"model.language_model.layers.{part}" for part in ("0.mlp.up_proj", "1.self_attn.o_proj", "2.mlp.down_proj")]
SIZE = 0.02


def log_probabilities(program: Program, sample: dict[str, Any], site: str = "", seed: int = 0) -> torch.Tensor:
    """Of the first new token, f64[V], with noise of SIZE at the output of one linear."""
    on, seen = Placement.of(program), list[torch.Tensor]()
    made = torch.Generator().manual_seed(seed)

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        fact = stub_fact(node.args[1]) if is_call(node, aten.linear.default) else None  # type: ignore[arg-type]
        if fact is None or fact.site != site:
            return value
        return value + SIZE * torch.randn(value.shape, generator=made)

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if graph.name != PREFILL:
            return on.run(graph, feeds)
        results = run_watched(graph, feeds, look, on)
        head = program.graphs[HEAD]
        last = next(iter(results.values()))[:, -1:]
        seen.append(next(iter(on.run(head, {head.inputs[0]: last}).values()))[0, -1].double().log_softmax(-1))
        return results

    with Machine(program, execute) as machine, torch.no_grad():
        machine.prefill(sample)
    return seen[0]


def test_it_is_the_divergence_of_noise_at_the_output() -> None:
    """Noise of one size at all tokens and channels: the estimate has one draw a sample, so a factor of 2 is allowed."""
    sample = captured()[1]["one"]
    program = fresh(changed_recipe("w4a4kv4"))
    run_passes(program, [Canonicalize(), InsertQuantStubs()])
    found = loss_sensitivity(program, [sample] * 16, 16, "test")
    assert found.features > 0
    full = log_probabilities(program, sample)
    for site in SITES:
        divergences = []
        for seed in range(24):
            other = log_probabilities(program, sample, site, seed)
            divergences.append(float((full.exp() * (full - other)).sum()))
        width = next(
            int(node.meta["val"].shape[-1])
            for node in program.graphs[PREFILL].nodes
            if is_call(node, aten.linear.default) and stub_fact(node.args[1]).site == site  # type: ignore[union-attr]
        )
        expected = sum(divergences) / len(divergences)
        estimate = sum(found.linears[site]) * SIZE**2 * width
        assert 0.5 < estimate / expected < 2, (site, estimate, expected)
