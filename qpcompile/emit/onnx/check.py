"""Compare the answers of an ONNX folder with the compiled module's, with logit margins where they differ.

With exact numerics both sides compute codes from identically rounded sums (kernels/sums.py), so answers differ only if
one value in about 10^8 is rounded differently and affects the answer, or if two tokens tie. With fast numerics they add
in different orders: no equality is claimed, and the count of equal answers is what was measured (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import torch

from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.inputs import TYPES
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.errors import ExportError

WHY = {
    "exact": "a 4-bit code or a near tie rounded the other way",
    "fast": "float32 sums were added in another order, and a 4-bit code or a near tie rounded the other way",
}
"""Why answers differ, by the recipe's numerics."""
# Lead of a token over another, as logits, that rounding alone does not turn around.
NEAR_TIE = 0.05
WHY_FAST_FOLDER = "the folder's numbers are other ones, see manifest.json"


@dataclass(frozen=True)
class Difference:
    """The first token of an answer at which onnxruntime differs; `margin` is the lead of the module's token."""

    row: int
    step: int
    module: int
    onnx: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """The number of compared answers, and the differences."""

    answers: int
    different: tuple[Difference, ...]

    def to_dict(self, numerics: str = "exact", fast: bool = False) -> dict[str, Any]:
        """Plain values, with the reason in words.

        numerics: of the recipe. fast: the folder's numbers are not the module's.
        """
        why = WHY_FAST_FOLDER if fast else WHY[numerics]
        different = [asdict(each) for each in self.different]
        counts = {"answers": self.answers, "alike": self.answers - len(different)}
        return {"numerics": numerics, **counts, "different": different, "why": why if different else ""}


def operators_with(path: Path, kind: int) -> list[str]:
    """The operators of one .onnx file, also in functions, that take or give numbers of a type (onnx.TensorProto)."""
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    graph = onnx.shape_inference.infer_shapes(model).graph
    tensors = {tensor.name for tensor in graph.initializer if tensor.data_type == kind}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == kind:
            tensors.add(value.name)
    return sorted({node.op_type for node in graph.node if tensors & {*node.input, *node.output}})


def float64_operators(path: Path) -> list[str]:
    """The operators of one .onnx file that take or give float64, for which runtimes have few kernels."""
    return operators_with(path, onnx.TensorProto.DOUBLE)


def compare(
    generate: Callable[..., Any], folder: Path, batches: Iterable[Mapping[str, Any]], new_tokens: int = 8
) -> Comparison:
    """Generate with both sides on the same inputs.

    Args:
        generate: `generate` of the compiled module.
        folder: the exported folder.
        batches: inputs of `generate`.
        new_tokens: maximum length of answers.

    Raises ExportError if the folder does not answer.
    """
    try:
        return _compare(generate, folder, batches, new_tokens)
    except RunnerError as error:
        what = f"the folder does not answer: {error.what}"
        raise ExportError(what, where=error.where, do="use the compiled module, and report this family") from error


def _compare(
    generate: Callable[..., Any], folder: Path, batches: Iterable[Mapping[str, Any]], new_tokens: int
) -> Comparison:
    runner = OnnxVLM(folder, torch.get_num_threads())
    runner.generation = {**runner.generation, "do_sample": False}
    answers, different = 0, list[Difference]()
    for batch in batches:
        start = batch["input_ids"].shape[1]
        made = generate(
            **batch, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        given = {name: _array(value) for name, value in batch.items() if name not in TYPES}
        found = torch.from_numpy(runner.generate(**given, max_new_tokens=new_tokens))[:, start:]
        logits = torch.stack(made.logits, dim=1)
        for row, (own, other) in enumerate(zip(made.sequences[:, start:], found, strict=True)):
            if (difference := _first(answers + row, own, other, logits[row])) is not None:
                different.append(difference)
        answers += len(found)
    return Comparison(answers, tuple(different))


def _array(given: Any) -> Any:
    """A tensor, or a list of numbers, as an array for the runner, which does not support half precision."""
    tensor = torch.as_tensor(given)
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def _first(row: int, own: torch.Tensor, other: torch.Tensor, logits: torch.Tensor) -> Difference | None:
    """own, other: i64[T], T may differ after the end of all rows; logits: f[T, V] of the module."""
    for step, (left, right) in enumerate(zip(own.tolist(), other.tolist(), strict=False)):
        if left != right:
            return Difference(row, step, left, right, float(logits[step, left] - logits[step, right]))
    return None


def accepted(
    generate: Callable[..., Any], folder: Path, batches: Sequence[Mapping[str, Any]], strict: bool
) -> Comparison:
    """Compare as `compare` does. Raises ExportError also if answers differ by more than near ties: any of them where
    `strict`, else most of them.
    """
    found = compare(generate, folder, batches)
    wrong = [each for each in found.different if each.margin > NEAR_TIE]
    if len(wrong) > (0 if strict else found.answers // 2):
        raise ExportError(
            f"{len(wrong)} of {found.answers} answers of the folder are not the module's; the first: {wrong[0]}",
            where="check",
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        )
    return found
