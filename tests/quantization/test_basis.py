"""The change of basis: its effect on the data, and where its scale is folded."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from programs import HERE, changed_recipe, relative, stubbed
from toy_decoder import decode_graph, prefill_graph, toy_feeds

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.ir.edit import clone, get_tensor, set_tensor
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.quantization.basis import change_basis
from qpcompile.runtime.interpret import run_watched

FEEDS = toy_feeds(2, 9)


def inputs_of(graph: Graph) -> dict[str, torch.Tensor]:
    """The activations at each activation stub, f32[T, C]."""
    seen: dict[str, torch.Tensor] = {}

    def look(node: Any, args: tuple[Any, ...], found: Any) -> Any:
        fact = stub_fact(node)
        if fact is not None and fact.role == "activation":
            seen[fact.site] = found[:, 1:].reshape(-1, found.shape[-1])
        return found

    run_watched(graph, FEEDS, look, HERE)
    return seen


def measured(*settings: str) -> Program:
    """The toy decoder with statistics of real activations."""
    recipe = changed_recipe("w4a4kv4", "quantize.ignore=[]", "quantize.center=null", *settings)
    program = stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe, layers=2)
    for site, rows in inputs_of(program.graphs[PREFILL]).items():
        program.measured[CALIBRATION].inputs[site] = InputStatistics.empty(rows.shape[1], moments=True)
        program.measured[CALIBRATION].inputs[site].add(rows)
    return program


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("smooth", ["null", "0.5"])
def test_statistics_move_with_the_data(transform: str, smooth: str) -> None:
    program = measured(f"quantize.transform={transform}", f"quantize.smooth={smooth}")
    FoldTransforms().run(program)
    calibration = program.measured[CALIBRATION]
    for site, rows in inputs_of(program.graphs[PREFILL]).items():
        moments = calibration.inputs[site].moments
        assert moments is not None and relative(moments.dense(), rows.T @ rows) < 1e-4, site


def test_smoothing_balances_inputs_and_weights() -> None:
    program = measured("quantize.transform=none", "quantize.smooth=0.5", "quantize.kv_cache.bits=16")
    FoldTransforms().run(program)
    graph = program.graphs[PREFILL]
    largest = inputs_of(graph)["model.layers.1.mlp.down_proj"].abs().amax(dim=0)
    weights = get_tensor(graph.module, "layers.1.mlp.down_proj.weight").abs().amax(dim=0)
    # s = sqrt(max|x| / max|w|) leaves sqrt(max|x| max|w|) on both sides.
    assert torch.allclose(largest, weights, rtol=1e-4)


def test_smoothing_goes_into_norms_and_products() -> None:
    program = measured("quantize.transform=none", "quantize.smooth=0.5")
    scheme = program.recipe.quantize
    assert scheme is not None
    basis = change_basis([program.graphs[PREFILL]], scheme, program.measured[CALIBRATION], HERE)
    assert not basis.nodes, "nothing is left to do online"
    changed = {name.removeprefix("layers.0.") for name in basis.tensors if name.startswith("layers.0")}
    linears = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert changed == linears | {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {
        "norms.0.weight",
        "norms.1.weight",
    }


@pytest.mark.parametrize("transform", ["none", "hadamard", "flatquant"])
def test_centre_takes_the_mean_away_and_gives_it_back(transform: str) -> None:
    program = measured(f"quantize.transform={transform}", "quantize.center=0")
    graph = program.graphs[PREFILL]
    before = graph(FEEDS)["hidden"]
    FoldTransforms().run(program)
    assert relative(graph(FEEDS)["hidden"][:, 1:], before[:, 1:]) < 1e-4
    for site, rows in inputs_of(graph).items():
        assert rows.mean(dim=0).abs().max() < 1e-4 * rows.abs().max(), site
        moments = program.measured[CALIBRATION].inputs[site].moments
        assert moments is not None and relative(moments.dense(), rows.T @ rows) < 1e-3, site


def test_no_centre_where_the_mean_is_small() -> None:
    program = measured("quantize.center=0.99")
    scheme = program.recipe.quantize
    assert scheme is not None
    basis = change_basis([program.graphs[PREFILL]], scheme, program.measured[CALIBRATION], HERE)
    assert not basis.biases and all(change.shift is None for change in basis.nodes.values())


@pytest.mark.parametrize("scaling", ["awq", "mbq"])
def test_searched_scales_are_exact_too(scaling: str) -> None:
    program = measured("quantize.smooth=null", f"quantize.scaling={scaling}")
    before = program.graphs[PREFILL](FEEDS)["hidden"]
    FoldTransforms().run(program)
    assert relative(program.graphs[PREFILL](FEEDS)["hidden"][:, 1:], before[:, 1:]) < 1e-4


def test_a_weight_is_replaced_in_all_graphs_and_gone() -> None:
    program = measured()
    graph = program.graphs[PREFILL]
    other = clone(graph)
    name = "layers.1.mlp.down_proj.weight"
    # A case that the graphs of the other tests do not contain.
    own = get_tensor(graph.module, name).detach().clone()
    for each in (graph, other):
        set_tensor(each.module, name, own)
    weight = weakref.ref(own)
    del own
    scheme = program.recipe.quantize
    assert scheme is not None
    basis = change_basis([graph, other], scheme, program.measured[CALIBRATION], HERE)
    assert name in basis.tensors and weight() is None
    assert get_tensor(other.module, name) is get_tensor(graph.module, name)


def test_unused_channels_keep_their_scale() -> None:
    program = measured("quantize.transform=none", "quantize.smooth=0.5", "quantize.kv_cache.bits=16")
    program.measured[CALIBRATION].inputs["model.layers.0.mlp.down_proj"].largest[3] = 0
    before = get_tensor(program.graphs[PREFILL].module, "layers.0.mlp.down_proj.weight").detach().clone()
    FoldTransforms().run(program)
    after = get_tensor(program.graphs[PREFILL].module, "layers.0.mlp.down_proj.weight")
    assert torch.equal(after[:, 3], before[:, 3]) and not torch.equal(after[:, 4], before[:, 4])
    assert after.isfinite().all()
