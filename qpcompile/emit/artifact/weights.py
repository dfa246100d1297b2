"""Store the tensors of a program in safetensors files, each once, and load them.

A tensor is stored under its name in the model, `<owner of the graph>.<target>`. Prefill and decode share weights, and a
head may be tied to the embeddings: the graphs' files refer to tensors by key.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qpcompile.emit.artifact import json_text
from qpcompile.emit.artifact.folder import AGAIN, read_json, reading
from qpcompile.emit.artifact.settings import INDEX
from qpcompile.errors import ArtifactError
from qpcompile.ir.edit import get_tensor
from qpcompile.ir.program import Program
from qpcompile.runtime.host import host_tensors

SHARD_BYTES = 2 * 10**9
MOST_HEADER_BYTES = 32 * 2**20
_STORED = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64"})


@dataclass
class StoredTensors:
    """`tensors` by key; `graphs[name][target]` and `host[name]` map a graph's or the host's tensor to its key."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    graphs: dict[str, dict[str, str]] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    _places: dict[tuple[object, ...], str] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, reader: str) -> str:
        """Add a tensor called `name` in the model; returns its key. `reader` disambiguates two tensors of one name."""
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
    # A weight held by a graph is zero-sized in the host.
    own = {name: tensor for name, tensor in host_tensors(program.host, set()).items() if tensor.numel()}
    stored.host = {name: stored.add(name, tensor, "host") for name, tensor in own.items()}
    return stored


def total_bytes(stored: StoredTensors, graph: str | None = None) -> int:
    """Bytes of all tensors, or of those that one graph reads; each counted once."""
    keys = stored.tensors if graph is None else set(stored.graphs[graph].values())
    return sum(stored.tensors[key].nbytes for key in keys)


def write_weights(tensors: Mapping[str, torch.Tensor], folder: Path, limit: int = SHARD_BYTES) -> None:
    """Write safetensors files of at most `limit` bytes (larger tensors get their own file) and their index."""
    shards = list(_shards(tensors, limit))
    where: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / name).touch()
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        save_file({key: _own_copy(tensors[key]) for key in keys}, folder / name, metadata={"format": "pt"})
        # safetensors creates files readable by the owner only; use the mode of the other files.
        (folder / name).chmod(mode)
        where |= dict.fromkeys(keys, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path, files: Collection[str]) -> dict[str, torch.Tensor]:
    """All tensors by key, memory-mapped rather than copied. `files` are the paths that belong to the folder.

    Raises ArtifactError for an index or a file that `write_weights` could not have written.
    """
    index = _read_index(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(index.values())):
        if name not in files or "/" in name or not name.endswith(".safetensors"):
            raise _refused(f"the index names {name!r:.200}, which is not a file of the artifact", INDEX)
        expected = {key for key, file in index.items() if file == name}
        with reading("the weights", folder / name):
            _check_header(folder / name, expected)
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in sorted(expected)}
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor key -> file name."""
    data = read_json(folder / INDEX)
    index = data.get("weight_map") if isinstance(data, dict) and data.keys() == {"metadata", "weight_map"} else None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise _refused("it is not an index of tensors", INDEX)
    return index


def _check_header(path: Path, expected: Collection[str]) -> None:
    """Refuse a header larger than any we write, or with other tensors than in the index."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MOST_HEADER_BYTES):
            raise ValueError(f"its header has {length} bytes; the file has {size}, and {MOST_HEADER_BYTES} are read")
        header = json_text.parse(file.read(length))
    if not isinstance(header, dict) or header.keys() - {"__metadata__"} != set(expected):
        raise ValueError("it does not hold the tensors that the index says")
    for key in expected:
        # Types that torch would load as another type are never written by a compile.
        if not isinstance(header[key], dict) or header[key].get("dtype") not in _STORED:
            raise ValueError(f"the tensor {key!r:.80} has a type that no compile writes")


def _refused(what: str, where: str) -> ArtifactError:
    return ArtifactError(what, where=where, do=AGAIN)


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
    """The tensor on the CPU in its own storage, as safetensors requires."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)))
