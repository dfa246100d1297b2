"""Tensors to safetensors and back: each once, any dtype, any number of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import fx

from qpcompile.emit.artifact.weights import (
    INDEX,
    StoredTensors,
    read_weights,
    stored_tensors,
    total_bytes,
    write_weights,
)
from qpcompile.errors import ArtifactError
from qpcompile.ir.edit import set_tensor
from qpcompile.ir.names import names
from qpcompile.ir.program import Graph, Program
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe

TENSORS = {
    "a.packed": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "a.scale": torch.tensor([[0.5], [float("nan")]]),
    "b.weight": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "c.scalar": torch.tensor(3),
    "d.mask": torch.tensor([True, False]),
    "e.empty": torch.empty(0, 4),
    "f.view": torch.arange(20.0).reshape(4, 5)[:, 1:3],
}


@pytest.mark.parametrize("limit", [1, 30, 10**9])
def test_tensors_of_every_type_come_back(tmp_path: Path, limit: int) -> None:
    write_weights(TENSORS, tmp_path, limit)
    read = read_weights(tmp_path, [path.name for path in tmp_path.iterdir()])
    assert sorted(read) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert read[key].dtype == tensor.dtype
        torch.testing.assert_close(read[key], tensor, rtol=0, atol=0, equal_nan=True)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]


def test_files_stay_below_the_limit(tmp_path: Path) -> None:
    write_weights(TENSORS, tmp_path, 40)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 40


def test_index_that_names_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    write_weights(TENSORS, tmp_path)
    (tmp_path / INDEX).write_text((tmp_path / INDEX).read_text().replace("c.scalar", "c.vector"))
    with pytest.raises(ArtifactError, match="does not hold the tensors that the index says"):
        read_weights(tmp_path, [path.name for path in tmp_path.iterdir()])


def graph(name: str, owner: str, **weights: torch.Tensor) -> Graph:
    """A graph that sums its weights."""
    root, made = torch.nn.Module(), fx.Graph()
    value = made.placeholder("x")
    for target, tensor in weights.items():
        set_tensor(root, target, tensor)
        value = made.call_function(torch.ops.aten.add.Tensor, (value, made.get_attr(target)))
    made.output((value,))
    return Graph(name, fx.GraphModule(root, made), names(("x",)), names(("y",)), owner)


def program(*graphs: Graph, host: torch.nn.Module) -> Program:
    """A program of these graphs."""
    recipe = Recipe.load("none")
    return Program({item.name: item for item in graphs}, host, (), recipe, Plan(recipe=recipe))


def test_shared_tensors_are_stored_once() -> None:
    weight, constant = torch.ones(2, 2), torch.zeros(1)
    host = torch.nn.Module()
    host.embed = torch.nn.Module()
    host.embed.weight = torch.nn.Parameter(weight, requires_grad=False)
    host.gone = torch.nn.Parameter(torch.empty(0))
    stored = stored_tensors(
        program(
            graph("prefill", "lm", weight=torch.full((2,), 3.0), lifted=constant),
            graph("decode", "lm", weight=torch.full((2,), 3.0), lifted=torch.ones(1)),
            graph("head", "head", weight=weight),
            host=host,
        )
    )
    assert sorted(stored.tensors) == ["head.weight", "lm.lifted", "lm.lifted@decode", "lm.weight"]
    assert stored.graphs["decode"] == {"weight": "lm.weight", "lifted": "lm.lifted@decode"}
    assert stored.host == {"embed.weight": "head.weight"}
    assert (total_bytes(stored), total_bytes(stored, "prefill"), total_bytes(stored, "head")) == (32, 12, 16)


def test_same_storage_seen_another_way_is_another_tensor() -> None:
    stored, tensor = StoredTensors(), torch.arange(4.0).reshape(2, 2)
    assert stored.add("a", tensor, "x") == "a"
    assert stored.add("b", tensor.T, "x") == "b"
    assert stored.add("c", tensor.view(2, 2), "x") == "a"
