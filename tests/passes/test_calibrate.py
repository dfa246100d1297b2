"""Calibration statistics equal those of the model's own activations, sample by sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import Inputs
from programs import captured, changed_recipe, fresh

from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.errors import CalibrationError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs

Apply = Callable[[Program, Calibrate], bool]
LAYER = "model.language_model.layers.1"
SITES = {
    f"{LAYER}.self_attn.q_proj": f"{LAYER}.self_attn.k_proj",
    f"{LAYER}.mlp.down_proj": f"{LAYER}.mlp.down_proj",
    "model.multi_modal_projector.linear_2": "model.multi_modal_projector.linear_2",
}


def marked(*settings: str, recipe: str = "w4a4kv4") -> Program:
    """The captured LLaVA with its stubs."""
    program = fresh(changed_recipe(recipe, *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs()])
    return program


def eager_inputs(samples: list[Inputs]) -> dict[str, torch.Tensor]:
    """The inputs of one linear of each site, f32[T, C], by hooks on the model."""
    model, _, _ = captured()
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def note(site: str, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen[site].append(args[0].reshape(-1, args[0].shape[-1]))

    hooks = [
        model.get_submodule(module).register_forward_pre_hook(functools.partial(note, site))
        for site, module in SITES.items()
    ]
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    return {site: torch.cat(parts) for site, parts in seen.items()}


def test_statistics_are_those_of_the_model(apply: Apply) -> None:
    _, cases, _ = captured()
    samples = [cases["one"], cases["longer"]]
    program = marked()
    assert not apply(program, Calibrate(samples, 2))
    found = program.measured[CALIBRATION]
    assert found.samples == 2
    for site, rows in eager_inputs(samples).items():
        statistics = found.inputs[site]
        assert statistics.tokens == rows.shape[0]
        assert torch.allclose(statistics.largest, rows.abs().amax(dim=0), atol=1e-5)
        assert statistics.moments is not None
        assert torch.allclose(statistics.moments.dense(), rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_samples_are_streamed(apply: Apply) -> None:
    _, cases, _ = captured()

    class Stream:
        """Yields one sample at a time and checks that the previous one has been released."""

        taken = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for _ in range(2):
                self.taken += 1
                yield cases["one"]

    stream = Stream()
    program = marked("quantize.weights.solver=rtn")
    Calibrate(stream, 2).run(program)
    assert stream.taken == 2
    assert all(statistics.moments is None for statistics in program.measured[CALIBRATION].inputs.values())


@pytest.mark.parametrize("recipe", ["none", "prune-30"])
def test_nothing_to_do(apply: Apply, recipe: str) -> None:
    program = marked(recipe=recipe)
    assert not apply(program, Calibrate([], 0))
    assert program.measured[CALIBRATION] == Calibration()


def test_refusals() -> None:
    _, cases, _ = captured()
    program = marked()
    ids = cases["one"]["input_ids"]
    disagrees = {**cases["one"], "input_ids": torch.cat([ids, ids[:, 5:6]], dim=1)}
    disagrees["attention_mask"] = torch.ones_like(disagrees["input_ids"])
    with pytest.raises(CalibrationError, match="does not take this sample") as error:
        Calibrate([cases["one"], disagrees], 2).run(program)
    assert error.value.where is not None and error.value.where.startswith("calibration sample 1, keys")
    broken = {**cases["one"], "pixel_values": cases["one"]["pixel_values"] * torch.nan}
    with pytest.raises(CalibrationError, match="not finite") as error:
        Calibrate([broken], 1).run(program)
    assert "pixel_values has values that are not finite" in error.value.what
