"""What the runtimes that a folder can be exported for execute; demands.py compares a folder with it.

Lists are of standard operators that a runtime lacks, out of those that an export may write (runner/folder.py). An
operator that it has may still be refused for its types or sizes: the runtime itself has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qpcompile.emit.onnx.runner.folder import CONTRIB_OPERATORS
from qpcompile.errors import ExportError

GENAI = "genai"
_SEQUENCES = ("ConcatFromSequence", "SequenceEmpty", "SequenceInsert")


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    source: the version that was looked at, or the list. fast: the form of graphs it gets. functions: whether it is
    known to read ONNX functions (functions.py). lacks: standard operators it does not have. contrib: onnxruntime's own
    operators that it has. types: ONNX types it does not compute in, and what it does instead. settings: what to pass to
    it for the module's numbers.
    """

    source: str
    fast: bool
    functions: bool = True
    lacks: frozenset[str] = frozenset()
    contrib: frozenset[str] = frozenset()
    types: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    in_browsers: bool = False


RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": Runtime("onnxruntime and onnxruntime-node 1.30 and newer", fast=True, contrib=CONTRIB_OPERATORS),
    "web": Runtime("onnxruntime-web 1.30, WebAssembly", fast=True, contrib=CONTRIB_OPERATORS, in_browsers=True),
    GENAI: Runtime("onnxruntime-genai 0.18, CPU, as a decoder-pipeline", fast=True, contrib=CONTRIB_OPERATORS),
    "openvino": Runtime(
        "OpenVINO 2026.4, CPU",
        fast=False,
        functions=False,
        lacks=frozenset(_SEQUENCES),
        types={"DOUBLE": "computed as float32, so that sums are not numerics: exact's"},
        settings={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    ),
    "tensorrt": Runtime(
        "onnx-tensorrt 10.1, docs/operators.md",
        fast=False,
        functions=False,
        lacks=frozenset(
            (
                *("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "MatMulInteger", "NonZero"),
                *("Unique", "Xor", *_SEQUENCES),
            )
        ),
        types={"DOUBLE": "computed as float32", "UINT8": "known as an input and an output of a graph only"},
    ),
}


def runtime(name: str) -> Runtime:
    """The runtime of this name; ExportError for an unknown one."""
    if name not in RUNTIMES:
        raise ExportError(f"there is no runtime {name!r}"[:100], where="--for", do=f"name one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def with_functions(name: str | None) -> bool:
    """Whether graphs have functions: those for any runtime do."""
    return name is None or runtime(name).functions


def fast_form(fast: bool, name: str | None) -> bool:
    """Whether graphs are the fast ones: asked for, or chosen for a runtime. Raises ExportError if the two disagree."""
    if name is None:
        return fast
    wanted = runtime(name)
    if fast and not wanted.fast:
        raise ExportError(
            f"fast graphs have onnxruntime's own operators, which {name} does not run",
            where="fast, --for",
            do="leave one of them out",
        )
    return wanted.fast
