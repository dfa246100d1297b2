"""The tensors of a program, each once, in and out of safetensors files.

A tensor is stored under its name in the model, `<owner of the graph>.<target>`. Prefill and decode read the same
weights, and a head may share its matrix with the embeddings: the graphs' files say which key each of them reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qpcompile.errors import ArtifactError
from qpcompile.ir.edit import get_tensor
from qpcompile.ir.host import host_tensors
from qpcompile.ir.program import Program

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9


@dataclass
class StoredTensors:
    """`tensors` by key; `graphs[name][target]` and `host[name]` say which key a graph's or the host's tensor has."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    graphs: dict[str, dict[str, str]] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    _places: dict[tuple[object, ...], str] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, reader: str) -> str:
        """The key of a tensor called `name` in the model; `reader` tells apart two tensors of one name."""
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in self._places:
            return self._places[place]
        key = name
        if key in self.tensors and not _same_bytes(self.tensors[key], tensor):
            key = f"{name}@{reader}"
        self.tensors.setdefault(key, tensor)
        self._places[place] = key
        return key


def stored_tensors(program: Program) -> StoredTensors:
    """Every tensor of the graphs and of the host, each once."""
    stored = StoredTensors()
    for graph in program.graphs.values():
        prefix = f"{graph.owner}." if graph.owner else ""
        targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
        stored.graphs[graph.name] = {
            target: stored.add(prefix + target, get_tensor(graph.module, target).detach(), graph.name)
            for target in targets
        }
    # A weight that a graph holds is zero-sized in the host.
    own = {name: tensor for name, tensor in host_tensors(program.host, set()).items() if tensor.numel()}
    stored.host = {name: stored.add(name, tensor, "host") for name, tensor in own.items()}
    return stored


def total_bytes(stored: StoredTensors, graph: str | None = None) -> int:
    """Bytes of all tensors, or of those that one graph reads; each counted once."""
    keys = stored.tensors if graph is None else set(stored.graphs[graph].values())
    return sum(stored.tensors[key].nbytes for key in keys)


def write_weights(tensors: Mapping[str, torch.Tensor], folder: Path, limit: int = SHARD_BYTES) -> None:
    """Write safetensors files of at most `limit` bytes (a larger tensor has one of its own) and their index."""
    shards = list(_shards(tensors, limit))
    where: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: _own_copy(tensors[key]) for key in keys}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by key, mapped from the files rather than copied."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(index.values())):
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys() if index.get(key) == name}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"the weights cannot be read: {error}", where=str(folder / name), do="save the model again"
            ) from error
    if missing := sorted(set(index) - set(tensors)):
        raise ArtifactError(f"no file holds the tensor {missing[0]}", where=INDEX, do="save the model again")
    return tensors


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    """Sorted keys in runs of at most `limit` bytes."""
    keys: list[str] = []
    size = 0
    for key in sorted(tensors):
        if keys and size + tensors[key].nbytes > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensors[key].nbytes
    yield keys


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU in a storage that holds nothing else, as safetensors asks."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)))
