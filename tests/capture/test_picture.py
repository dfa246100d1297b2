"""Every kind of picture file is read as the RGB that a viewer shows, or refused with an error that names the file."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from qpcompile import picture
from qpcompile.errors import CalibrationError
from qpcompile.picture import check_picture, read_picture

RED, WHITE = (255, 0, 0), (255, 255, 255)


def grey(values: Any, dtype: Any) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=dtype).reshape(1, -1))


def greys(image: Image.Image) -> list[int]:
    """One number per pixel of a grey picture in colour."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    if path.suffix == ".pgm":  # not every Pillow version writes 16 bits here; all read them
        values = np.asarray(image)
        path.write_bytes(b"P5 %d %d 65535\n" % image.size + values.astype(">u2").tobytes())
    else:
        image.save(path, **options)
    return path


# Orientation


def scene() -> Image.Image:
    """64 x 96, white, a red bar on top and a blue square at the lower right."""
    image = Image.new("RGB", (64, 96), "white")
    image.paste("red", (0, 0, 64, 32))
    image.paste("blue", (32, 64, 64, 96))
    return image


STORED = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = scene()
    for turn in STORED[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = saved(tmp_path / f"phone.{suffix}", stored, exif=exif, **options)
    read = read_picture(path)
    assert read.size == (64, 96)
    np.testing.assert_allclose(np.asarray(read, dtype=int), np.asarray(scene(), dtype=int), atol=12)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_is_none_is_ignored(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    assert read_picture(saved(tmp_path / "a.png", scene(), exif=exif)).size == (64, 96)


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_exif_that_is_none_is_ignored(tmp_path: Path, block: bytes) -> None:
    path = saved(tmp_path / "a.jpg", scene(), exif=block)
    assert read_picture(path).size == (64, 96)


# Grey of more than 8 bits


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bits_take_the_range_of_the_type(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", grey([0, 257, 25_700, 32_896, 65_535, 4_000], np.uint16))
    assert greys(read_picture(path)) == [0, 1, 100, 128, 255, 16]
    # No rescaling: a dark picture stays dark.
    assert greys(read_picture(saved(path, grey([0, 2_570], np.uint16)))) == [0, 10]


def test_sixteen_bits_where_zero_is_white(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tiff", grey([0, 65_535, 257], np.uint16), tiffinfo={262: 0})
    assert greys(read_picture(path)) == [255, 0, 254]


def test_twelve_bits_of_a_tiff(tmp_path: Path) -> None:
    # Two values in three bytes: 0x000 and 0xFFF.
    path = saved(tmp_path / "a.tiff", grey([0, 0], np.uint16))
    raw = bytearray(path.read_bytes())
    with Image.open(path) as image:
        offset = image.tag_v2[273][0]  # type: ignore[attr-defined]
    raw[offset : offset + 3] = b"\x00\x0f\xff"
    bits = raw.index(b"\x02\x01\x03\x00\x01\x00\x00\x00\x10\x00")
    raw[bits + 8] = 12
    path.write_bytes(raw)
    assert greys(read_picture(path)) == [0, 255]


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.25, 0.5], [64, 128]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1000.0, 1500.0, 2000.0], [0, 128, 255]),
        ([1000.0, 1000.0], [0, 0]),
    ],
)
def test_floats_take_their_own_range(tmp_path: Path, values: list[float], right: list[int]) -> None:
    image = grey(values, np.float32)
    assert greys(read_picture(saved(tmp_path / "a.tiff", image))) == right
    assert greys(read_picture(image)) == right


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257, 65_535], [0, 1, 255]),
        ([-1000, 0, 3000], [0, 64, 255]),
        ([0, 2**31 - 1], [0, 255]),
    ],
)
def test_integers_of_32_bits(tmp_path: Path, values: list[int], right: list[int]) -> None:
    assert greys(read_picture(saved(tmp_path / "a.tiff", grey(values, np.int32)))) == right


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path / "depth.tiff", grey([0.0, value], np.float32))
    with pytest.raises(CalibrationError, match=r"depth\.tiff cannot be decoded: it holds values that are not finite"):
        read_picture(path)


# Colours and transparency


def palette(**changes: Any) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info.update(changes)
    return image


def two(mode: str, first: Any, second: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), first)
    image.putpixel((1, 0), second)
    return image


KINDS: dict[str, tuple[str, Image.Image, dict[str, Any], list[tuple[int, int, int]]]] = {
    "colour": ("png", two("RGB", RED, (1, 2, 3)), {}, [RED, (1, 2, 3)]),
    "grey": ("png", two("L", 7, 200), {}, [(7, 7, 7), (200, 200, 200)]),
    "one bit": ("png", two("1", 0, 255), {}, [(0, 0, 0), WHITE]),
    "palette": ("png", palette(), {}, [RED, (0, 0, 255)]),
    "palette, one clear": ("png", palette(), {"transparency": 1}, [RED, WHITE]),
    "palette, half clear": ("png", palette(), {"transparency": b"\xff\x80"}, [RED, (127, 127, 255)]),
    "gif, one clear": ("gif", palette(), {"transparency": 0}, [WHITE, (0, 0, 255)]),
    "alpha": ("png", two("RGBA", (255, 0, 0, 255), (0, 255, 0, 0)), {}, [RED, WHITE]),
    "half alpha": ("png", two("RGBA", (0, 0, 0, 128), (0, 0, 0, 255)), {}, [(127, 127, 127), (0, 0, 0)]),
    "grey alpha": ("png", two("LA", (9, 255), (9, 0)), {}, [(9, 9, 9), WHITE]),
    "clear colour": ("png", two("RGB", RED, (1, 2, 3)), {"transparency": (1, 2, 3)}, [RED, WHITE]),
    "clear grey": ("png", two("L", 7, 200), {"transparency": 7}, [WHITE, (200, 200, 200)]),
    "clear bit": ("png", two("1", 0, 255), {"transparency": 0}, [WHITE, WHITE]),
    "clear 16 bits": ("png", grey([500, 0], np.uint16), {"transparency": 500}, [WHITE, (0, 0, 0)]),
    "cmyk": ("tiff", two("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), {}, [RED, WHITE]),
    "webp": ("webp", two("RGBA", (255, 0, 0, 255), (0, 255, 0, 0)), {"lossless": True}, [RED, WHITE]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_colours(tmp_path: Path, kind: str) -> None:
    suffix, image, options, right = KINDS[kind]
    read = read_picture(saved(tmp_path / f"a.{suffix}", image, **options))
    assert read.mode == "RGB"
    assert [read.getpixel((x, 0)) for x in (0, 1)] == right


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
def test_the_ordinary_kinds_are_those_of_transformers(tmp_path: Path, mode: str) -> None:
    # Packed: only Pillow 13 writes an unpacked TIFF of YCbCr that Pillow can read.
    path = saved(tmp_path / "a.tiff", scene().convert(mode), compression="tiff_lzw")
    np.testing.assert_array_equal(np.asarray(read_picture(path)), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "RGBX", "HSV", "LAB", "LA", "I", "F", "I;16", "I;16B"])
def test_every_mode_in_memory_becomes_colour(mode: str) -> None:
    assert read_picture(Image.new(mode, (3, 2))).mode == "RGB"


def test_a_picture_in_memory_stays_as_it_was() -> None:
    image = palette(transparency=1)
    assert read_picture(image).getpixel((1, 0)) == WHITE
    assert image.mode == "P" and image.info == {"transparency": 1}


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_several_frames_the_first(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "white")]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    path = saved(tmp_path / f"a.{suffix}", frames[0], **options, **({"lossless": True} if suffix == "webp" else {}))
    assert read_picture(path).getpixel((4, 4)) == RED


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", Image.new("RGB", (8, 8), "red"))
    (tmp_path / "a.png").rename(tmp_path / "a.txt")
    assert read_picture(tmp_path / "a.txt").getpixel((4, 4)) == RED


# What is not a picture


def told(error: pytest.ExceptionInfo[CalibrationError], path: Path) -> None:
    assert str(path) in error.value.what and error.value.where and error.value.do


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(str(path))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "is missing"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.touch(), "is an empty file"),
    "pipe": (pipe, "is a pipe, a socket or a device"),
    "socket": (listener, "is a pipe, a socket or a device"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "text": (lambda path: path.write_text("no picture"), "is not a picture"),
    "postscript": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "is not a picture",
    ),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("read", [read_picture, check_picture])
def test_what_is_no_picture_is_named(
    tmp_path: Path, make: Callable[[Path], Any], message: str, read: Callable[[Path], Any]
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(CalibrationError, match=message) as error:
        read(tmp_path / "a.png")
    told(error, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "n" * 300 + ".png", "~/a.png", "https://a.b/c.png"])
def test_paths_that_cannot_be(name: str) -> None:
    with pytest.raises(CalibrationError):
        read_picture(name)


def test_who_asked_is_said(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as error:
        read_picture(tmp_path / "a.png", where="data.jsonl, line 3")
    assert error.value.where == "data.jsonl, line 3" and str(tmp_path / "a.png") in error.value.what


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff", "ppm"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_cut_short_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CalibrationError, match=r"cannot be decoded|is not a picture") as error:
        read_picture(path)
    told(error, path)


def huge(width: int, height: int) -> bytes:
    """A PNG of 70 bytes whose header claims a large size."""
    target = BytesIO()
    Image.new("1", (1, 1)).save(target, "PNG")
    raw = bytearray(target.getvalue())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize("size", [(13_378, 13_378), (65_000, 65_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(huge(*size))
    for read in (read_picture, check_picture):
        with pytest.raises(CalibrationError, match=r"bomb\.png .*pixels") as error:
            read(tmp_path / "bomb.png")
        told(error, tmp_path / "bomb.png")


def test_the_bound_holds_where_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(huge(65_000, 65_000))
    with pytest.raises(CalibrationError, match="65000 x 65000 pixels; at most 178,956,970"):
        check_picture(tmp_path / "bomb.png")
    monkeypatch.setattr(picture, "MOST_PIXELS", 64 * 96 - 1)
    with pytest.raises(CalibrationError, match="64 x 96 pixels; at most 6,143"):
        read_picture(saved(tmp_path / "a.png", scene()))


SAMPLES = {
    suffix: (lambda target: (scene().save(target, kind), target.getvalue())[1])(BytesIO())
    for suffix, kind in [("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("tiff", "TIFF"), ("webp", "WEBP")]
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(sorted(SAMPLES)),
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    length=st.integers(0, 10**6),
)
@example(suffix="png", places=[], length=8)
def test_damaged_bytes_give_a_picture_or_an_error_of_ours(
    tmp_path: Path, suffix: str, places: list[tuple[int, int]], length: int
) -> None:
    raw = bytearray(SAMPLES[suffix])
    for place, value in places:
        raw[place % len(raw)] = value
    path = tmp_path / "a.bin"
    path.write_bytes(raw[: length % (2 * len(raw))])
    try:
        assert read_picture(path).mode == "RGB"
    except CalibrationError as error:
        assert str(path) in error.what
