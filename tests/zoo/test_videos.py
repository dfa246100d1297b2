"""A model compiled from prompts with pictures answers about a video as the model does.

python -m pytest -m slow tests/zoo/test_videos.py
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from models import build
from one import check_same, compiled_by
from shape import SHAPES
from videos import with_video

from qpcompile.capture.capture import capture
from qpcompile.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "exaone4_5")
FRAMES = ("llava_next_video", "video_llava", "llava_onevision")


@pytest.mark.parametrize("name", [*GRIDS, *FRAMES])
def test_a_video_is_answered_as_by_the_model(name: str) -> None:
    shape = SHAPES["standard"]
    model, cases = build(name, shape)
    sample, video = cases["one"], with_video(name, model, shape, cases["one"])
    program = capture(model, copy.deepcopy(sample), Recipe.load("none"))
    check_same(compiled_by(program, "none", [], [sample]), model, {"video": video, "one": sample})
    # The last step of a compile answers its first sample with the cache and without.
    pruned = compiled_by(program, "prune-30", ["tokens.method=random_input"], [video, sample])
    assert pruned.generate(**copy.deepcopy(video), max_new_tokens=2).shape[0] == 1
