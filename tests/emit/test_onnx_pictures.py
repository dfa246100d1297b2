"""Pictures of awkward shapes and modes become the pixel values that transformers' processors on Pillow make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qpcompile.emit.onnx import speech
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.pictures import Pictures, opened
from qpcompile.picture import read_picture

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"
SMALL = {"shortest_edge": 30}
SECOND = Image.new("L", (30, 31), 200)


def noise(mode: str, width: int, height: int, depth: type = np.uint8) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if bands == 1 else (height, width, bands)
    values = np.random.default_rng(width).integers(0, np.iinfo(depth).max, shape, depth)
    return Image.fromarray(values) if bands == 1 else Image.fromarray(values, mode)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    noise("RGB", 41, 23).save(path, exif=exif)


def clear(path: Path) -> None:
    noise("RGB", 33, 47).quantize(16).save(path, transparency=3)


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "one pixel": ("a.png", lambda path: noise("RGB", 1, 1).save(path)),
    "tall": ("a.png", lambda path: noise("RGB", 7, 301).save(path)),
    "wide": ("a.png", lambda path: noise("RGB", 400, 9).save(path)),
    "right size": ("a.png", lambda path: noise("RGB", 96, 96).save(path)),
    "odd": ("a.jpg", lambda path: noise("RGB", 131, 97).save(path)),
    "palette with a clear colour": ("a.png", clear),
    "alpha": ("a.png", lambda path: noise("RGBA", 61, 50).save(path)),
    "16 bits": ("a.png", lambda path: noise("I;16", 45, 38, np.uint16).save(path)),
    "grey": ("a.png", lambda path: noise("L", 20, 30).save(path)),
    "turned": ("a.jpg", turned),
    "animated": (
        "a.gif",
        lambda path: noise("L", 30, 31).save(path, save_all=True, append_images=[noise("L", 30, 31)]),
    ),
}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "testbed, fixed": lambda: AutoImageProcessor.from_pretrained(TESTBEDS / "llava"),
    "testbed, patches": lambda: AutoImageProcessor.from_pretrained(TESTBEDS / "qwen2_5_vl"),
    "clip": lambda: CLIPImageProcessorPil(size=SMALL, crop_size={"height": 30, "width": 30}),
    "crop beyond the picture": lambda: CLIPImageProcessorPil(size=SMALL, crop_size={"height": 43, "width": 36}),
    "stretched": lambda: SiglipImageProcessorPil(size={"height": 28, "width": 42}, resample=2),
    "square": lambda: LlavaImageProcessorPil(size=SMALL, crop_size={"height": 30, "width": 30}, do_pad=True),
    "not normalized": lambda: SiglipImageProcessorPil(size={"height": 9, "width": 9}, do_normalize=False),
    "not rescaled": lambda: SiglipImageProcessorPil(size={"height": 9, "width": 9}, do_rescale=False, resample=1),
    "large patches": lambda: Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 20}),
    "single frames": lambda: Qwen2VLImageProcessorPil(temporal_patch_size=1, patch_size=8, merge_size=3),
}


def settings_of(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Pictures:
    """The settings as an export writes them; the number of tokens, of a model, does not count here."""
    monkeypatch.setattr(speech, "_made", lambda *_: {"input_ids": np.array([[7]])})
    return Pictures.read(speech.picture_settings(SimpleNamespace(image_processor=processor), 7), "pictures.json")


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = PROCESSORS[name]()
    pictures = settings_of(processor, monkeypatch)
    for case, (file, write) in FILES.items():
        (tmp_path / case).mkdir()
        path = tmp_path / case / file
        write(path)
        wanted = processor(read_picture(path), return_tensors="np")
        found, (tokens,) = pictures.inputs([opened(str(path))])
        assert set(found) == set(wanted), case
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype and np.array_equal(found[key], value), (case, key)
        if "image_grid_thw" in wanted:
            assert tokens == wanted["image_grid_thw"].prod() // processor.merge_size**2


def test_several_pictures_are_packed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [noise("RGB", 80, 40), noise("RGB", 33, 90)]
    processor = PROCESSORS["testbed, patches"]()
    found, tokens = settings_of(processor, monkeypatch).inputs(given)
    wanted = processor(given, return_tensors="np")
    assert all(np.array_equal(found[name], wanted[name]) for name in ("pixel_values", "image_grid_thw"))
    assert len(tokens) == 2 and settings_of(processor, monkeypatch).inputs([]) == ({}, [])


class OwnResize(CLIPImageProcessorPil):
    def resize(self, *args: Any, **options: Any) -> Any:
        return super().resize(*args, **options)


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "tiles": (LlavaNextImageProcessorPil, "LlavaNextImageProcessorPil computes _preprocess"),
    "its own resize": (OwnResize, "OwnResize computes resize in its own way"),
    "longest edge": (lambda: CLIPImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 20}), "resizes to"),
    "padded afterwards": (lambda: CLIPImageProcessorPil(do_pad=True), "pads pictures after"),
    "patches as they are": (lambda: Qwen2VLImageProcessorPil(do_resize=False), "resizes to nothing"),
}


@pytest.mark.parametrize(("make", "message"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_other_processors_are_not_guessed_at(
    make: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(speech.Mute, match=message):
        settings_of(make(), monkeypatch)


@pytest.mark.parametrize("kind", ["fixed", "patches"])
def test_pictures_that_would_fill_the_memory_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = settings_of(PROCESSORS[f"testbed, {kind}"](), monkeypatch)
    with pytest.raises(RunnerError, match=r"would become 96 x 192000000|is too long") as error:
        pictures.inputs([Image.new("RGB", (1, 2_000_000))])
    assert error.value.do


WRONG: dict[str, Any] = {
    "kind": "tiles",
    "resample": 9,
    "size": [0],
    "rescale": "x",
    "mean": [1, 2],
    "std": [0, 1, 1],
    "pad": [1, 2, 300],
    "crop": [10**9, 4],
    "tokens": True,
    "extra": 1,
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_settings_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "_made", lambda *_: {"input_ids": np.array([[7]])})
    processor = SimpleNamespace(image_processor=PROCESSORS["testbed, fixed"]())
    with pytest.raises(RunnerError, match=name if name != "std" else "do not belong") as error:
        Pictures.read(speech.picture_settings(processor, 7) | {name: WRONG[name]}, "pictures.json")
    assert error.value.where == "pictures.json" and error.value.do


def test_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x" * 99)
    with pytest.raises(RunnerError, match="not a picture") as error:
        opened(tmp_path / "a.png")
    assert "a.png" in error.value.where and error.value.do
