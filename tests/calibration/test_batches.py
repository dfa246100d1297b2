"""Batches of samples for training: what is padded, what is not, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import captured, fresh, relative

from qpcompile.calibration.batches import batches
from qpcompile.ir.program import PREFILL
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine, execute_graph


def sample(length: int, pictures: int = 1, **more: Any) -> dict[str, Any]:
    ids = torch.arange(1, length + 1)[None]
    return {"input_ids": ids, "pixel_values": torch.full((pictures, 3, 2, 2), float(length)), **more}


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_every_prompt_stands_at_the_end_of_its_row(lengths: list[int], size: int) -> None:
    numbered = list(batches([sample(length) for length in lengths], size))
    assert [first for first, _ in numbered] == list(range(0, len(lengths), size))
    found = [batch for _, batch in numbered]
    assert [len(batch["input_ids"]) for batch in found] == [
        min(size, len(lengths) - start) for start in range(0, len(lengths), size)
    ]
    rows = [(batch, row) for batch in found for row in range(len(batch["input_ids"]))]
    for length, (batch, row) in zip(lengths, rows, strict=True):
        ids, mask = batch["input_ids"][row], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row]
        assert ids[len(ids) - length :].tolist() == list(range(1, length + 1))
        assert mask.tolist() == [0] * (len(ids) - length) + [1] * length
        assert batch["pixel_values"][row, 0, 0, 0] == length


def test_pictures_follow_one_another() -> None:
    ((_, found),) = batches([sample(3, pictures=2), sample(3, pictures=1)], 2)
    assert found["pixel_values"].shape == (3, 3, 2, 2)


def test_token_types_of_padding_are_text() -> None:
    one, other = sample(2), sample(4)
    for each in (one, other):
        each["mm_token_type_ids"] = torch.ones_like(each["input_ids"])
    ((_, found),) = batches([one, other], 2)
    assert found["mm_token_type_ids"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert found["input_ids"][0].tolist() == [2, 2, 1, 2]


@pytest.mark.parametrize(
    "other",
    [
        sample(3, grid=torch.ones(1, 3)),
        {**sample(3), "pixel_values": torch.zeros(1, 3, 4, 4)},
        {**sample(3), "pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)},
        {**sample(3), "pixel_values": "a picture"},
    ],
)
def test_what_does_not_fit_goes_apart(other: dict[str, Any]) -> None:
    (_, alone), (first, behind), *_ = batches([sample(3), other, other], 4)
    assert len(alone["input_ids"]) == 1 and first == 1
    assert behind["pixel_values"] is other["pixel_values"] or len(behind["input_ids"]) == 2


def test_a_batch_gives_what_its_samples_give() -> None:
    _, cases, _ = captured()
    seen = []

    def execute(graph, feeds):  # noqa: ANN001, ANN202
        result = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            seen.append(next(iter(result.values())))
        return result

    machine = Machine(fresh(Recipe.load("none")), execute)
    ((_, both),) = batches([cases["one"], cases["longer"]], 2)
    for inputs in (both, cases["one"], cases["longer"]):
        machine.prefill(inputs)
    together, *apart = seen
    assert together.shape[0] == 2
    for row, alone in zip(together, apart, strict=True):
        assert relative(row[-alone.shape[1] :], alone[0]) < 1e-4
