"""Prepare the tracing sample: two rows, one of them padded, so that no axis is specialized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from qpcompile.errors import CalibrationError
from qpcompile.nested import is_list
from qpcompile.runtime.model_inputs import DECODER_IDS

# What inputs with pictures in them are called.
PICTURES = ("pixel_values", "image_patches", "flattened_patches", "images")
# Inputs with a row per prompt, like others that have an entry per token; everything else has a row per picture (or per
# patch), of at most so many numbers where it tells their sizes.
MOST_COLUMNS = 4
PerToken = Literal["integers", "none", "all"]
ROWS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")


def check_sample(inputs: dict[str, Any], prompt: bool = False) -> None:
    """Refuse a sample that is not valid input of `model.generate(**inputs)`, has no picture, or non-finite values.

    prompt: whether there has to be one; an encoder-decoder model may start it itself.
    """
    ids = inputs.get("input_ids")
    if (prompt or "input_ids" in inputs) and (not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel()):
        raise _error("has no input_ids of shape [batch, tokens]", inputs)
    if ids is not None and (ids.dtype not in (torch.int64, torch.int32) or int(ids.min()) < 0):
        raise _error(f"has input_ids of {ids.dtype} from {ids.min().item()} on, where token ids are integers", inputs)
    for key, value in inputs.items():
        if (
            key == "attention_mask"
            and ids is not None
            and (not isinstance(value, torch.Tensor) or value.shape != ids.shape)
        ):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise _error(f"has an attention_mask of {found} for input_ids of {tuple(ids.shape)}", inputs)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise _error(f"has numbers in {key} that are not finite", inputs)
    if not any(key.startswith(PICTURES) for key in inputs):
        raise CalibrationError(
            "a sample has no picture in it",
            where=f"sample keys {sorted(map(str, inputs))}",
            do="give image-text samples: the vision tower and the token scores are calibrated on them",
        )


def _error(problem: str, inputs: dict[str, Any]) -> CalibrationError:
    return CalibrationError(
        f"a sample {problem}",
        where=f"sample keys {sorted(map(str, inputs))}",
        do='build samples with processor.apply_chat_template(..., return_dict=True, return_tensors="pt")',
    )


def two_rows(
    inputs: dict[str, Any],
    pad: int,
    axis: int = 0,
    per_token: PerToken = "integers",
    visual: Sequence[int] = (),
    more: int = 1,
) -> dict[str, Any]:
    """At least two rows, `more` tokens longer: text is prepended, whose first token in row 0 is padding.

    So no axis has size 1, and no mask is all ones (which transformers would omit).

    Args:
        inputs: one or more rows, as the processor returns them; of an encoder-decoder model, with the decoder's ids.
        pad: id of the padding token.
        axis: the axis on which pixels are repeated; some processors put the patches of all pictures side by side.
        per_token: which inputs beside ROWS have an entry per token, of those whose first sizes are the prompt's.
        visual: ids of picture tokens, each of which has its features: a prompt may end, or begin, with them.
    """
    check_sample(inputs, prompt=DECODER_IDS not in inputs)
    ids = inputs.get("input_ids")
    shape = inputs[DECODER_IDS].shape if ids is None else ids.shape
    text = _last_text(ids, visual) if ids is not None else 0
    masked = {"attention_mask": torch.ones_like(ids)} if ids is not None else {}
    longer: dict[str, Any] = {}
    for key, value in {**masked, **inputs}.items():
        if not isinstance(value, torch.Tensor):
            longer[key] = [*value, *value] if is_list(value) and shape[0] == 1 else value
            continue
        side = axis if value.is_floating_point() and value.ndim > 2 else 0
        rows = torch.cat([value, value], dim=side) if shape[0] == 1 else value
        asked = per_token == "integers" and not value.is_floating_point() and shape[1] > MOST_COLUMNS
        counted = (asked or per_token == "all") and value.ndim > 1
        if ids is not None and (key in ROWS or counted) and value.shape[:2] == shape:
            rows = torch.cat([*[rows[:, text : text + 1]] * more, rows], dim=1)
            if key in (fills := {"input_ids": pad, "attention_mask": 0}):
                rows[0, 0] = fills[key]
        longer[key] = rows
    return longer


def _last_text(ids: torch.Tensor, visual: Sequence[int]) -> int:
    """The last token, of ids i64[B, S], that is of text in every row; the last of all if there is none."""
    of_text = (~torch.isin(ids, torch.tensor(visual, dtype=ids.dtype))).all(dim=0)
    found = of_text.nonzero()
    return int(found[-1]) if len(found) else ids.shape[1] - 1
