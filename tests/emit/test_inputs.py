"""Inputs of a compiled model: invalid ones are refused by name, the others give the same answers as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import InputError
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.model_inputs import check_inputs
from tests.families import IMAGE, PAD

Case = dict[str, torch.Tensor]
Tiny = tuple[Any, dict[str, Case]]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}


def with_pixels(change: Callable[[torch.Tensor], Any]) -> Callable[[Case], Any]:
    return lambda case: case | {"pixel_values": change(case["pixel_values"])}


def with_ids(change: Callable[[torch.Tensor], Any]) -> Callable[[Case], Any]:
    return lambda case: case | {"input_ids": change(case["input_ids"])}


def with_mask(change: Callable[[torch.Tensor], Any]) -> Callable[[Case], Any]:
    return lambda case: case | {"attention_mask": change(case["attention_mask"])}


def with_positions(change: Callable[[torch.Tensor], Any]) -> Callable[[Case], Any]:
    return lambda case: case | {"position_ids": change(torch.arange(case["input_ids"].shape[1]).expand(2, -1))}


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One pixel of this value."""

    def change(pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.clone()
        pixels.view(-1)[7] = value
        return pixels

    return change


def replaced(old: int, new: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.where(ids == old, new, ids)


def second_row(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A mask whose last row is `value` everywhere."""
    return lambda mask: torch.cat([mask[:1], torch.full_like(mask[1:], value)])


WRONG: dict[str, tuple[Callable[[Case], Any], str]] = {
    "not a number": (with_pixels(poisoned(float("nan"))), "pixel_values has values that are not finite"),
    "infinite": (with_pixels(poisoned(float("inf"))), "pixel_values has values that are not finite"),
    "image tokens alone": (lambda case: {k: case[k] for k in ("input_ids", "attention_mask")}, "no image was given"),
    "picture alone": (with_ids(replaced(IMAGE, 5)), "does not take these inputs.*do not match"),
    "one picture less": (with_pixels(lambda pixels: pixels[:1]), "does not take these inputs.*do not match"),
    "larger picture": (with_pixels(lambda pixels: torch.zeros(2, 3, 64, 64)), "does not take these inputs"),
    "bytes for pixels": (with_pixels(lambda pixels: pixels.to(torch.uint8)), "pixel_values is uint8 .*float32"),
    "pixels of one picture": (with_pixels(lambda pixels: pixels[0]), "pixel_values is float32 with 3 axes.* and 4"),
    "pixels of batches": (with_pixels(lambda pixels: pixels[None]), "pixel_values is float32 with 5 axes"),
    "positions that are not whole numbers": (with_positions(lambda ids: ids.float()), "position_ids is float32"),
    "positions without rows": (with_positions(lambda ids: ids[0]), "position_ids is int64 with 1 axes"),
    "negative id": (with_ids(lambda ids: ids - 3), "has token -3; this model's are 0 to 98"),
    "large id": (with_ids(replaced(1, 99)), "has token 99"),
    "float ids": (with_ids(lambda ids: ids.float()), r"input_ids is float32\[2, 30\]"),
    "ids without rows": (with_ids(lambda ids: ids[0]), r"input_ids is int64\[30\]"),
    "list of ids": (with_ids(lambda ids: ids.tolist()), "input_ids is a list"),
    "empty prompt": (lambda case: {"input_ids": case["input_ids"][:, :0]}, "the prompt is empty"),
    "no rows": (lambda case: {name: value[:0] for name, value in case.items()}, "the prompt is empty"),
    "no prompt": (lambda case: {"pixel_values": case["pixel_values"]}, "there is no prompt"),
    "short mask": (with_mask(lambda mask: mask[:, 1:]), r"attention_mask is int64\[2, 29\]"),
    "mask of axes": (with_mask(lambda mask: mask[:, None, None]), "attention_mask is int64"),
    "mask of twos": (with_mask(lambda mask: mask * 2), "values beside 0 and 1"),
    "closed row": (with_mask(second_row(0)), "leaves no token of a row"),
    "list for a mask": (with_mask(lambda mask: mask.tolist()), "attention_mask is a list"),
    "typo": (lambda case: case | {"pixel_value": case["pixel_values"]}, "pixel_value is neither"),
    "prompt twice": (lambda case: case | {"inputs": case["input_ids"]}, "given twice"),
    "elsewhere": (with_ids(lambda ids: ids.to("meta")), "input_ids is on meta"),
    "another layer": (lambda case: case | {"vision_feature_layer": -1}, "vision_feature_layer"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_inputs_are_refused_by_name(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, change: Callable[[Case], Any], message: str
) -> None:
    given = change(dict(tiny_llava[1]["padded"]))
    for ask in (lambda: compiled_llava.generate(**given, **GREEDY), lambda: compiled_llava.kept_tokens(**given)):
        with pytest.raises(InputError, match=message) as error:
            ask()
        assert error.value.where and error.value.do


def right_padded(case: Case) -> Case:
    """Padding after the text: transformers warns and answers."""
    moved = [row.roll(-int((row == PAD).sum())) for row in case["input_ids"]]
    ids = torch.stack(moved)
    return case | {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def holed(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[:, -3] = 0
    return mask


ODD: dict[str, Callable[[Case], Any]] = {
    "padded on the right": right_padded,
    "a hole in the mask": with_mask(holed),
    "no mask": lambda case: {name: value for name, value in case.items() if name != "attention_mask"},
    "bool mask": with_mask(lambda mask: mask.bool()),
    "float mask": with_mask(lambda mask: mask.float()),
    "short ids": with_ids(lambda ids: ids.int()),
    "double pixels": with_pixels(lambda pixels: pixels.double()),
    "half pixels": with_pixels(lambda pixels: pixels.bfloat16()),
    "own positions": lambda case: case | {"position_ids": torch.arange(case["input_ids"].shape[1]).expand(2, -1) * 2},
    "short positions": with_positions(lambda ids: ids.int()),
    "the model's own layer": lambda case: case | {"vision_feature_layer": -2},
    "nothing at all": lambda case: {},
}


@pytest.mark.parametrize("change", ODD.values(), ids=list(ODD))
def test_odd_inputs_answer_as_eager(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, change: Callable[[Case], Any]
) -> None:
    model, cases = tiny_llava
    given = change(dict(cases["padded"]))
    assert torch.equal(compiled_llava.generate(**given, **GREEDY), model.generate(**given, **GREEDY))


def test_a_model_on_meta_is_refused(compiled_llava: CompiledVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(compiled_llava.machine.host), "device", torch.device("meta"))
    with pytest.raises(InputError, match="moved to the meta device"):
        compiled_llava.generate(input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 4, 6]], "has 24 patches, 16 were given"),
        ([[2**31, 2**31, 4]], "patches, 16 were given"),
        ([[1, -4, -4]], "1 or more"),
        ([1, 4, 4], "1 or more"),
    ],
)
def test_sizes_of_patches(compiled_llava: CompiledVLM, grid: Any, message: str) -> None:
    given = {
        "input_ids": torch.tensor([[1, IMAGE]]),
        "pixel_values": torch.zeros(16, 12),
        "image_grid_thw": torch.tensor(grid),
    }
    with pytest.raises(InputError, match=message):
        check_inputs(compiled_llava.machine.host, given)


def test_errors_of_hooks_stay_what_they_are(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    def broken(row: int, ids: torch.Tensor) -> list[int]:
        raise ValueError("mine")

    Machine(compiled_llava.program)  # the host is bound to the newest machine; the older one must still recognise hooks
    with pytest.raises(ValueError, match=r"^mine$"):
        compiled_llava.generate(**tiny_llava[1]["one"], **GREEDY, prefix_allowed_tokens_fn=broken)
