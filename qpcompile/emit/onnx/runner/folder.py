"""Before onnxruntime sees an exported folder: every file is the one that was written, graphs hold only arithmetic.

A hash shows that a file was not altered, not who wrote it. So whatever the hashes say, a graph may name no file but the
weights beside it, within that file's size, and no operator that is not on the list below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

MANIFEST, WEIGHTS, GRAPHS = "manifest.json", "weights.data", ("vision.onnx", "prefill.onnx", "decode.onnx")
# A folder may have more vision graphs.
GRAPH = ".onnx"
SETTINGS = ("config.json", "generation_config.json")
# What turns questions into token ids and back: all three, or none.
TOKENIZER, PICTURES, CHAT = "tokenizer.json", "pictures.json", "chat.json"
FORMAT, VERSION = "qpcompile-onnx", 1
MOST_TEXT, MOST_GRAPH, MOST_WEIGHTS, MOST_FILES, DEEPEST, DEEPEST_TEXT = 2**22, 2**28, 2**40, 64, 8, 64
MOST_PARTS = (
    2**21
)  # operands, attributes, tensors and the like of a graph: each takes a runtime a hundred times its bytes
# Numbers and axes of one tensor of a graph, whatever the weights file holds.
MOST_NUMBERS, MOST_AXES = 2**36, 8
NEW_FOLDER = "get the folder again from where it was exported, or export the model again"

# What an export may write. Nothing here reads a file, calls code, or draws random numbers.
# fmt: off
OPERATORS = frozenset(
    (
        "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
        "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConcatFromSequence", "Constant", "ConstantOfShape",
        "Conv", "Cos", "CumSum", "DequantizeLinear", "Div", "Einsum", "Equal", "Erf", "Exp", "Expand", "Flatten",
        "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "GridSample",
        "Identity", "If", "LayerNormalization", "Less", "LessOrEqual", "Log", "Loop", "MatMul", "MatMulInteger", "Max",
        "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal",
        "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu",
        "Reshape", "Round", "ScatterElements", "ScatterND", "SequenceEmpty", "SequenceInsert", "Shape", "Sigmoid",
        "Sign", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK",
        "Transpose", "Trilu", "Unique", "Unsqueeze", "Where", "Xor",
    )
)
# fmt: on
# onnxruntime's own, which `export --fast` writes.
CONTRIB = "com.microsoft"
CONTRIB_OPERATORS = frozenset(
    ["GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "RotaryEmbedding"]
)

# Of functions, which hold what is listed above and call no other.
OWN = "qpcompile"
# Bytes of a function's name, and of the names of what a call takes and gives: onnxruntime writes them again for each
# node of the function.
LONGEST_NAME = 512

# Field numbers of onnx.proto: messages by name, with what is read of each. A number that is missing here is refused
# where it holds code or names a file (training, sparse tensors) and let be where it is only text.
_MODEL_GRAPH, _MODEL_FUNCTION, _MODEL_REFUSED = 7, 25, {20: "training steps"}
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN = 1, 7, 10
_FUNCTION_REFUSED = {6: "functions with attributes", 11: "functions with attributes", 13: "overloaded functions"}
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_REFUSED = 1, 5, {15: "sparse tensors"}
_NODE_VALUES, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = (1, 2), 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_REFUSED = (
    (5, 10),
    (6, 11),
    {22: "sparse tensors", 23: "sparse tensors"},
)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 9, 13, 14
_TENSOR_REFUSED: dict[int, str] = dict.fromkeys((3, 4, 5, 6, 7, 10, 11), "numbers that are not raw bytes")
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_PART = ""  # what a walk gives for each part; a call of a function is also its name
# TensorProto.DataType -> bits: float, uint8, int8, ..., uint4 and int4. Text is not among them.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


class RunnerError(Exception):
    """What is wrong, where, and what to do: the one error of the runner."""

    def __init__(self, what: str, where: str, do: str) -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  what to do: {self.do}"


def check_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], frozenset[str]]:
    """The model's configuration, its generation settings and the names of all files, which were found as exported.

    Raises RunnerError naming the file that is missing, altered, a link, too large, or holds what no export writes.
    """
    if not folder.is_dir():
        raise RunnerError("there is no such folder", str(folder), "name a folder that an export wrote")
    files = _listed(read_json(folder / MANIFEST), folder)
    speaking = [name for name in (TOKENIZER, PICTURES, CHAT) if name in files]
    for name in (*GRAPHS, *SETTINGS, WEIGHTS, *((TOKENIZER, PICTURES, CHAT) if speaking else ())):
        if name not in files:
            raise RunnerError(f"{MANIFEST} does not list {name}", str(folder), NEW_FOLDER)
    for name, entry in files.items():
        _check_file(folder / name, entry)
    for name in (name for name in files if name.endswith(GRAPH)):
        check_graph(folder / name, files[WEIGHTS]["bytes"])
    config, settings = (read_json(folder / name) for name in SETTINGS)
    return config, settings, frozenset(files)


def read_json(path: Path, most: int = MOST_TEXT) -> dict[str, Any]:
    """A JSON file of at most so many bytes that holds an object; no object has a key twice, which readers differ in."""
    _regular(path, most)
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once_each)
        _check_depth(content)
    except (OSError, ValueError, RecursionError) as error:
        raise RunnerError(f"the file cannot be read: {error}", str(path), NEW_FOLDER) from error
    if not isinstance(content, dict):
        raise RunnerError("the file holds no object", str(path), NEW_FOLDER)
    return content


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_depth(content: Any) -> None:
    level: list[Any] = [content]
    for _ in range(DEEPEST_TEXT):
        level = [each for each in level if isinstance(each, (dict, list))]
        level = [each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST_TEXT} deep")


def _listed(manifest: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Names and sizes of all files that belong to the folder."""
    where = str(folder / MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        found = f"{manifest.get('format')!r}, version {manifest.get('version')!r}"[:100]
        raise RunnerError(
            f"this is not an exported folder: format {found}", where, f"name a folder of {FORMAT} {VERSION}"
        )
    if manifest.get("digest") != digest(manifest):
        raise RunnerError("the file is not the one that was exported: its digest differs", where, NEW_FOLDER)
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES:
        raise RunnerError("files is not a list of files", where, NEW_FOLDER)
    for name, entry in files.items():
        sound = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not _NAME.fullmatch(name) or not sound:
            raise RunnerError(f"{name[:100]!r} is not a file of this folder with size and hash", where, NEW_FOLDER)
    return files


def digest(manifest: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a manifest says, its own digest left out."""
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _regular(path: Path, most: int) -> int:
    """The size of a file that is not a link and not too large."""
    if path.is_symlink() or not path.is_file():
        what = "the file is missing" if not path.exists() and not path.is_symlink() else "this is a link, or no file"
        raise RunnerError(what, str(path), NEW_FOLDER)
    size = path.stat().st_size
    if size > most:
        raise RunnerError(f"the file has {size} bytes; at most {most} are read", str(path), NEW_FOLDER)
    return size


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if _regular(path, MOST_GRAPH if path.name.endswith(GRAPH) else MOST_WEIGHTS) != entry["bytes"]:
        raise RunnerError("the file is not the one that was exported: its size differs", str(path), NEW_FOLDER)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunnerError(f"the file cannot be read: {error.strerror}", str(path), NEW_FOLDER) from error
    if digest != entry["sha256"]:
        raise RunnerError("the file is not the one that was exported: its hash differs", str(path), NEW_FOLDER)


def check_graph(path: Path, weights: int) -> None:
    """Walk one .onnx file; weights: bytes of the weights file beside it."""
    try:
        _check_model(memoryview(path.read_bytes()), weights)
    except (ValueError, OSError) as error:
        raise RunnerError(f"the graph must not be run: {error}", str(path), NEW_FOLDER) from error


def _check_model(model: memoryview, weights: int) -> None:
    graphs, functions, sizes = list[memoryview](), dict[str, int](), dict[str, int]()
    for number, value in _fields(model, _MODEL_REFUSED):
        if number == _MODEL_GRAPH:
            graphs.append(_message(value))
        elif number == _MODEL_FUNCTION:
            name, parts = _check_function(_message(value), weights)
            if name in functions:
                raise ValueError(f"it has two functions {name[:100]!r}")
            functions[name], sizes[name] = parts, len(value)
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs")
    calls = _counted(_check_graph(graphs[0], weights, DEEPEST, functions))
    own = calls.pop(_PART, 0)
    inlined = len(graphs[0]) + sum(sizes[name] * count for name, count in calls.items())
    if inlined > MOST_GRAPH:
        raise ValueError(f"it has {inlined} bytes with its functions in place; at most {MOST_GRAPH} are loaded")
    if own + sum(parts * (1 + calls[name]) for name, parts in functions.items()) > MOST_PARTS:
        raise ValueError(f"it has more than {MOST_PARTS} operands, attributes and tensors with its functions in place")


def _counted(parts: Iterator[str]) -> Counter[str]:
    """The number of parts, and how often each function is called; no further than soon after too many."""
    return Counter(islice(parts, 2 * MOST_PARTS + 2))  # the node of a call is a part, too


def _check_function(function: memoryview, weights: int) -> tuple[str, int]:
    """The name of a function, which calls no other, and its number of parts."""
    names, domains, parts = list[str](), list[str](), 0
    for number, value in _fields(function, _FUNCTION_REFUSED):
        if number == _FUNCTION_NAME:
            names.append(_text(value))
        elif number == _FUNCTION_DOMAIN:
            domains.append(_text(value))
        elif number == _FUNCTION_NODE:
            parts += _counted(_check_node(_message(value), weights, DEEPEST, {}))[_PART]
    if len(names) != 1 or domains != [OWN] or len(names[0].encode()) > LONGEST_NAME:
        raise ValueError(f"no export writes the function {'.'.join((*domains, *names))[:100]!r}")
    return names[0], parts


def _check_graph(graph: memoryview, weights: int, depth: int, functions: Container[str]) -> Iterator[str]:
    """Gives _PART for each part, and the name of a function for each call of it."""
    if not depth:
        raise ValueError(f"graphs in graphs are more than {DEEPEST} deep")
    for number, value in _fields(graph, _GRAPH_REFUSED):
        yield _PART
        if number == _GRAPH_NODE:
            yield from _check_node(_message(value), weights, depth, functions)
        elif number == _GRAPH_TENSOR:
            _check_tensor(_message(value), weights)


def _check_node(node: memoryview, weights: int, depth: int, functions: Container[str]) -> Iterator[str]:
    operators, domains, longest = list[str](), list[str](), 0
    for number, value in _fields(node):
        yield _PART
        if number in _NODE_VALUES:
            longest = max(longest, len(_message(value)))
        elif number == _NODE_OPERATOR:
            operators.append(_text(value))
        elif number == _NODE_DOMAIN:
            domains.append(_text(value))
        elif number == _NODE_ATTRIBUTE:
            for part, content in _fields(_message(value), _ATTRIBUTE_REFUSED):
                yield _PART
                if part in _ATTRIBUTE_TENSORS:
                    _check_tensor(_message(content), weights)
                elif part in _ATTRIBUTE_GRAPHS:
                    yield from _check_graph(_message(content), weights, depth - 1, functions)
    standard = OPERATORS if domains in ([], [""]) else ()
    allowed = CONTRIB_OPERATORS if domains == [CONTRIB] else functions if domains == [OWN] else standard
    if len(operators) != 1 or operators[0] not in allowed:
        raise ValueError(f"no export writes the operator {'.'.join((*domains, *operators))[:100]!r}")
    if domains == [OWN]:
        if longest > LONGEST_NAME:
            raise ValueError(f"a call has a name of {longest} bytes; at most {LONGEST_NAME} are loaded")
        yield operators[0]


def _check_tensor(tensor: memoryview, weights: int) -> None:
    """A tensor lies in the file itself, or wholly inside the weights file."""
    sizes, kinds, places, entries = list[int](), list[Any](), list[Any](), dict[str, str]()
    inside = 0
    for number, value in _fields(tensor, _TENSOR_REFUSED):
        if number == _TENSOR_DIMS:
            sizes += [value] if isinstance(value, int) else _packed(value)
        elif number == _TENSOR_TYPE:
            kinds.append(value)
        elif number == _TENSOR_RAW:
            inside += len(_message(value))
        elif number == _TENSOR_LOCATION:
            places.append(value)
        elif number == _TENSOR_EXTERNAL:
            entry = dict(_fields(_message(value)))
            key = _text(entry.get(_ENTRY_KEY, memoryview(b"")))
            if key in entries:
                raise ValueError(f"a tensor says {key[:20]!r} twice")
            entries[key] = _text(entry.get(_ENTRY_VALUE, memoryview(b"")))
    if len(kinds) != 1 or kinds[0] not in _BITS:
        raise ValueError(f"a tensor has numbers of type {kinds}")
    count = math.prod(sizes) if len(sizes) <= MOST_AXES else MOST_NUMBERS + 1
    if count > MOST_NUMBERS or any(size >= 2**63 for size in sizes):
        raise ValueError(f"a tensor has the sizes {sizes[:MOST_AXES]}")
    needed = -(-count * _BITS[kinds[0]] // 8)
    if entries or any(places):
        _check_place(entries, needed, weights)
    elif inside != needed:
        raise ValueError(f"a tensor of {needed} bytes has {inside}")


def _check_place(entries: Mapping[str, str], needed: int, weights: int) -> None:
    """Where a tensor lies in the weights file: key -> text, as stored; needed: bytes of its numbers."""
    if set(entries) != {"location", "offset", "length"} or entries["location"] != WEIGHTS:
        raise ValueError(f"a tensor lies in {entries.get('location', '')[:100]!r}; the weights are in {WEIGHTS}")
    if not all(re.fullmatch(r"[0-9]{1,15}", entries[key], re.ASCII) for key in ("offset", "length")):
        raise ValueError("a tensor has no place in the weights")
    offset, length = int(entries["offset"]), int(entries["length"])
    if length != needed or offset + length > weights:
        raise ValueError(f"a tensor of {needed} bytes takes {length} at {offset} of {weights} bytes of weights")


def _fields(message: memoryview, refused: Mapping[int, str] | None = None) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an int, or the bytes of a text, message or fixed number."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if refused and number in refused:
            raise ValueError(f"it has {refused[number]}")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(message, at)
        if size is None or at + size > end:
            raise ValueError("it is not protobuf, or is cut off")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is not protobuf, or is cut off")


def _packed(values: memoryview) -> list[int]:
    numbers, at = list[int](), 0
    while at < len(values):
        number, at = _varint(values, at)
        numbers.append(number)
    return numbers


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("it is not the protobuf of a graph")
    return value


def _text(value: Any) -> str:
    return bytes(_message(value)).decode("utf-8")
