"""Operations: the share that QUOTA prints for its schedule, and what is counted when a tower runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import llava
from torch.utils.flop_counter import FlopCounterMode

from qpcompile.capture.capture import capture
from qpcompile.evaluate.run.flops import OURS, Decoder, picture_flops
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.program import Graph, Program
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine, execute_graph

TESTBED = Path(__file__).resolve().parents[1] / "testbed"

# LLaVA-1.5-7B, and QUOTA's counts after layers 2 to 6 (Figure 4 of arXiv 2604.17320).
LLAVA = Decoder(hidden=4096, attention=4096, cache=4096, mlp=11008)
ALL, KEPT, LAYERS = 576, [524, 441, 359, 274, 173], 32


def test_published_share_of_the_language_model() -> None:
    """40.89 %: counted from the layer that scores, 20 text tokens, without tower and projector."""
    seen = [ALL] * 2 + KEPT + [173] * 25
    assert 100 * LLAVA.prompt(seen, 20) / LLAVA.prompt([ALL] * LAYERS, 20) == pytest.approx(40.89, abs=0.005)


def test_share_with_tower_and_cuts_behind_the_layer() -> None:
    """About 49 %: with tower and projector, cuts effective from the next layer on, 60 text tokens."""
    tower = 23 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024) + 2 * 576 * 3 * 14**2 * 1024
    pictures = tower + 2 * 576 * (1024 * 4096 + 4096**2)
    seen = [ALL] * 3 + KEPT[:-1] + [173] * 25
    share = (pictures + LLAVA.prompt(seen, 60)) / (pictures + LLAVA.prompt([ALL] * LAYERS, 60))
    assert 100 * share == pytest.approx(48.9, abs=0.1)
    assert sum(seen) / LAYERS == pytest.approx(239.1, abs=0.05)


def test_widths_of_grouped_queries() -> None:
    text = SimpleNamespace(hidden_size=144, num_attention_heads=6, num_key_value_heads=2, intermediate_size=288)
    found = Decoder.of(SimpleNamespace(get_text_config=lambda: text))
    assert found == Decoder(hidden=144, attention=144, cache=48, mlp=288)


@pytest.fixture(scope="module")
def program() -> Program:
    model, cases = llava()
    return capture(model, cases["one"], Recipe())


def test_tower_and_projector_are_counted_as_they_run(program: Program) -> None:
    model, cases = llava()
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    d, m, seen = vision.hidden_size, vision.intermediate_size, tokens + 1
    layer = 2 * seen * (4 * d * d + 2 * d * m) + 4 * seen * seen * d
    patches = 2 * tokens * 3 * vision.patch_size**2 * d
    projector = 2 * tokens * (d * text.hidden_size + text.hidden_size**2)
    depth = len(list(calls(program.graphs["vision"], aten.scaled_dot_product_attention.default)))
    found = picture_flops(program, cases["one"])
    assert found == patches + depth * layer + projector
    assert picture_flops(program, cases["one"]) == found


def test_the_decoder_formula_counts_what_runs(program: Program) -> None:
    """The formula against PyTorch's counter on the captured prefill graph: all but rotary products, which are few."""
    model, cases = llava()
    total = 0

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal total
        if graph.name != "prefill":
            return execute_graph(graph, feeds)
        with FlopCounterMode(display=False, custom_mapping=dict(OURS)) as counter:
            results = execute_graph(graph, feeds)
        total = counter.get_total_flops()
        return results

    Machine(program, execute).prefill(cases["one"])
    tokens = cases["one"]["input_ids"].shape[1]
    formula = Decoder.of(model.config).prompt([tokens] * len(program.layers), 0)
    assert total == pytest.approx(formula, rel=0.01)


@pytest.mark.slow
def test_quantized_linears_count_like_others() -> None:
    """A compiled tower counts the products of the captured one."""
    bench = Workbench(str(TESTBED / "llava"), TESTBED / "calibration" / "llava")
    recipe = Recipe.load("w4a4kv4").with_overrides(["calibration.samples=1", "quantize.weights.solver=rtn"])
    captured, samples = bench.captured(recipe)
    assert samples is not None
    inputs = next(iter(samples))
    assert picture_flops(bench.compile(recipe).program, inputs) == picture_flops(captured, inputs)
