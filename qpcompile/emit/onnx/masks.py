"""Find the rule of each table that a decoder takes as its mask, on samples: the runner has no code of the host's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qpcompile.emit.onnx.runner.inputs import IDS, MASK
from qpcompile.emit.onnx.runner.masks import TOGETHER, MaskRule
from qpcompile.emit.onnx.sized import decoder_inputs, image_token
from qpcompile.errors import ExportError
from qpcompile.ir.names import Name
from qpcompile.ir.program import PREFILL, Program
from qpcompile.runtime.arguments import input_kinds

# Attributes of a configuration that hold the length of a window, and of a chunk.
WINDOWS, CHUNKS = ("sliding_window", "sliding_window_size"), ("attention_chunk_size",)


def tables_of(program: Program) -> list[str]:
    """The inputs of the decoder that are masks of four axes."""
    kinds = input_kinds(program.graphs[PREFILL])
    return [path for path, (_, axes) in kinds.items() if Name(path).root == MASK and axes == 4]


def mask_rules(program: Program, samples: Sequence[Mapping[str, Any]]) -> dict[str, MaskRule]:
    """The rule of each mask table, which holds for all samples, inputs of `generate`.

    Raises ExportError where none does.
    """
    paths = tables_of(program)
    if not paths:
        return {}
    if not samples:
        raise ExportError(
            f"the decoder takes {', '.join(paths)} as a table, whose rule is found on samples",
            where=PREFILL,
            do="give the export `check` inputs: prompts with pictures",
        )
    seen = [_seen(program, sample) for sample in samples]
    rules: dict[str, MaskRule] = {}
    for path in paths:
        fitting = (rule for rule in _candidates(program) if all(_fits(rule, each, path) for each in seen))
        rule = next(fitting, None)
        if rule is None:
            raise ExportError(
                f"which tokens see which, in {path}, follows no rule that the ONNX runner knows",
                where=PREFILL,
                do="use the compiled module: this family cannot be written as an ONNX folder yet",
            )
        rules[path] = rule
    return rules


def _seen(program: Program, sample: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Real tokens and image tokens of a sample, and its masks, bool[B, 1, S, S]."""
    tensors = {name: torch.as_tensor(value) for name, value in sample.items() if value is not None}
    ids = tensors[IDS]
    real = tensors.get(MASK, torch.ones_like(ids))
    feeds = decoder_inputs(program, tensors)
    masks = {path: _open(feeds[path]).numpy() for path in tables_of(program) if path in feeds}
    return real.numpy(), (ids == image_token(program)).numpy(), masks


def _open(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _candidates(program: Program) -> Iterator[MaskRule]:
    host: Any = program.host
    config = host.config.get_text_config()
    lengths = [{0, *(_number(config, name) for name in names)} for names in (WINDOWS, CHUNKS)]
    for together in TOGETHER:
        for window in sorted(lengths[0]):
            yield from (MaskRule(window, chunk, together) for chunk in sorted(lengths[1]))


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 0


def _fits(rule: MaskRule, seen: tuple[Any, Any, dict[str, Any]], path: str) -> bool:
    real, visual, masks = seen
    if path not in masks:
        # transformers leaves a mask out that is causal, or hides nothing.
        return rule.together == "none"
    table = rule.table(real, visual)
    rows = np.broadcast_to((real != 0)[:, None, :, None], table.shape)
    return masks[path].shape == table.shape and bool((masks[path] == table)[rows].all())
