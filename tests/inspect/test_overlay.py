"""Where the visual tokens of a picture are, and which of them each layer keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import CalibrationError
from qpcompile.inspect.overlay import border_path, cells_path, overlays, panels, seen_picture, token_grid
from qpcompile.recipe.plan import Plan

PIXELS = torch.zeros(1, 3, 96, 96)


@pytest.mark.parametrize(
    ("inputs", "count", "grid"),
    [
        ({"pixel_values": PIXELS}, 144, (12, 12)),
        ({"pixel_values": PIXELS}, 143, None),
        ({"pixel_values": PIXELS}, 0, None),
        ({"pixel_values": PIXELS.expand(4, -1, -1, -1)}, 144, None),
        ({"pixel_values": PIXELS[None]}, 144, (12, 12)),
        ({"pixel_values": torch.zeros(96, 20), "image_grid_thw": torch.tensor([[1, 8, 12]])}, 24, (4, 6)),
        ({"pixel_values": torch.zeros(96, 20), "image_grid_thw": torch.tensor([[2, 8, 12]])}, 48, None),
        ({"pixel_values": torch.zeros(96, 20), "image_grid_thw": torch.tensor([[1, 8, 12]] * 2)}, 48, None),
    ],
    ids=["fixed", "not square", "no token", "tiles", "one tile", "merged", "frames", "two pictures"],
)
def test_token_grid(inputs: dict[str, torch.Tensor], count: int, grid: tuple[int, int] | None) -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    assert token_grid(config, inputs, count) == grid


def test_panels_follow_the_cuts_and_ignore_text_and_empty_slots(plan: Plan) -> None:
    kept = {1: torch.tensor([0, 2, 4, 5, 9, -1]), 3: torch.tensor([0, 4, 9, -1, -1, -1])}
    found = panels(plan, kept, torch.tensor([2, 3, 4, 5]))
    assert [(panel.title, panel.kept) for panel in found] == [
        ("layers 0 to 1", (0, 1, 2, 3)),
        ("layers 2 to 3", (0, 2, 3)),
        ("layers 4 to 5", (2,)),
    ]
    assert {panel.total for panel in found} == {4}


def test_no_cut_is_one_panel(plan: Plan) -> None:
    (only,) = panels(plan, {}, torch.tensor([2, 3]))
    assert (only.title, only.kept) == ("layers 0 to 5", (0, 1))


def test_cells_of_one_row_are_one_box() -> None:
    assert cells_path([4, 1, 2, 3], (2, 4), 40, 20) == "M10 0h30v10h-30zM0 10h10v10h-10z"
    assert cells_path([], (2, 4), 40, 20) == ""


def test_border_is_between_kept_and_dropped_cells_only() -> None:
    # Cells of 10 x 10: x dropped, o kept.   x o
    #                                        x x
    assert border_path([0, 2, 3], (2, 2), 20, 20) == "M10 0v10M10 10h10"
    assert border_path([0, 1, 2, 3], (2, 2), 20, 20) == border_path([], (2, 2), 20, 20) == ""


def test_seen_picture_undoes_the_normalisation() -> None:
    settings = SimpleNamespace(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor = SimpleNamespace(image_processor=settings)
    pixels = torch.full((1, 3, 4, 6), 2.0)
    seen = seen_picture(Image.new("RGB", (99, 50)), {"pixel_values": pixels}, processor)
    assert seen.size == (6, 4) and seen.getpixel((0, 0)) == (255, 255, 255)


def test_patches_are_no_picture() -> None:
    given = Image.new("RGB", (99, 50))
    assert seen_picture(given, {"pixel_values": torch.zeros(20, 8)}, SimpleNamespace()) is given


def test_real_run_keeps_what_the_plan_says(compiled: CompiledVLM) -> None:
    (drawn,) = overlays(compiled.machine, compiled.processor, [(Image.new("RGB", (64, 64), "red"), "what is it?")])
    assert drawn.grid == (4, 4) and drawn.picture.startswith("data:image/png;base64,")
    counts = compiled.plan.visual_tokens(16)
    assert [len(panel.kept) for panel in drawn.panels] == sorted(set(counts), reverse=True)
    assert drawn.dropped_path(drawn.panels[0]) == "" and drawn.dropped_path(drawn.panels[-1])
    assert drawn.kept_border(drawn.panels[0]) == "" and drawn.kept_border(drawn.panels[-1])
    assert drawn.answer


def test_unreadable_picture_is_named(compiled: CompiledVLM, tmp_path: object) -> None:
    with pytest.raises(CalibrationError, match="is missing") as caught:
        overlays(compiled.machine, compiled.processor, [(f"{tmp_path}/absent.png", "?")])
    assert "absent.png" in str(caught.value)


def test_model_without_processor_is_refused(compiled: CompiledVLM) -> None:
    with pytest.raises(CalibrationError, match="processor"):
        overlays(compiled.machine, None, [])
