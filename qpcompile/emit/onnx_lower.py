"""A module becomes one ONNX graph: exported with symbolic sizes, translated, optimised, lowered to what runtimes have."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from qpcompile.emit.onnx_wrap import Component
from qpcompile.errors import ExportError

OPSET = 21
Table = Mapping[Callable[..., Any], Callable[..., Any]]
# Axes that must stay open, by the first part of an input's name; all others of that input are what the model fixes.
OPEN_AXES = {
    "input_ids": (0, 1),
    "attention_mask": (0, 1),
    "image_features": (0,),
    "position_ids": (-2, -1),
    "visual_mask": (0, 1),
    "visual_count": (0,),
    "tokens_seen": (0,),
    "past_key_values": (0, 2),
    "kept": (0, 1),
    "alive": (0, 1),
    "pixel_values": (0,),
    "hidden_states": (0,),
    "grid_thw": (0,),
    "cu_seqlens": (0,),
    "window_index": (0,),
    "cu_window_seqlens": (0,),
}


def to_onnx(name: str, module: Component, example: dict[str, torch.Tensor], table: Table) -> ir.Model:
    """The module as an ONNX model with named inputs and outputs.

    Raises ExportError if a size that must vary became a constant, or an operator has no translation.
    """
    args = tuple(example[path] for path in module.inputs)
    shapes = tuple(_dynamic(path, tensor) for path, tensor in zip(module.inputs, args, strict=True))
    with _quiet(), torch.no_grad():
        exported = _guarded(name, "traced", lambda: torch.export.export(module, args, dynamic_shapes=(shapes,), strict=False))
        _check_open(name, module, exported, shapes)
        _drop_checks(exported)
        program = _guarded(
            name,
            "translated",
            lambda: torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(module.inputs),
                output_names=list(module.outputs),
                custom_translation_table=dict(table),
                optimize=True,
                verbose=False,
            ),
        )
    assert program is not None
    return program.model


def _dynamic(path: str, tensor: torch.Tensor) -> dict[int, Any]:
    axes = OPEN_AXES[path.split(".")[0]]
    return {axis % tensor.ndim: torch.export.Dim.AUTO for axis in axes if tensor.shape[axis] != 1}


def _check_open(name: str, module: Component, exported: torch.export.ExportedProgram, shapes: tuple[dict[int, Any], ...]) -> None:
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for path, wanted, key in zip(module.inputs, shapes, exported.graph_signature.user_inputs, strict=True):
        frozen = [axis for axis in wanted if not isinstance(values[key].shape[axis], torch.SymInt)]
        if frozen:
            raise ExportError(
                f"axis {frozen[0]} of {path} became the constant {values[key].shape[frozen[0]]}",
                where=name,
                do="report this family: an operator in its graph cannot be exported with a size that varies",
            )


def _drop_checks(exported: torch.export.ExportedProgram) -> None:
    """Remove run-time assertions: ONNX has none."""
    graph = exported.graph_module.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and "assert" in getattr(node.target, "__name__", ""):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _guarded(name: str, done: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            f"{name} could not be {done} for ONNX: {type(error).__name__}: {lines[0] if lines else 'no message'}",
            where=name,
            do="report this family; the compiled module itself is not affected",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' notes: what they would say is checked here."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.fx.experimental", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
