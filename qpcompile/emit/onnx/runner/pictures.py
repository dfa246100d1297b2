"""From a picture to pixel values in Pillow and numpy, with the arithmetic of transformers' processors on Pillow.

    fixed     pad to a square, resize, crop the centre, rescale, normalize    -> pixel_values f[n, 3, H, W]
    patches   resize to whole patches within a number of pixels, rescale,     -> pixel_values f[P, C], image_grid_thw
              normalize, cut into patches ("Qwen2-VL", section 2.1, arXiv 2409.12191)

Each step is left out where `pictures.json` has null for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qpcompile.emit.onnx.runner.choice import whole
from qpcompile.emit.onnx.runner.folder import NEW_FOLDER, RunnerError
from qpcompile.emit.onnx.runner.inputs import GRID, PIXELS
from qpcompile.errors import CalibrationError
from qpcompile.picture import read_picture

Array = np.ndarray[Any, Any]

FIXED, PATCHES_KIND = "fixed", "patches"
_SHARED = ("kind", "resample", "size", "rescale", "mean", "std")
_OF_KIND = {FIXED: (*_SHARED, "pad", "crop", "tokens"), PATCHES_KIND: (*_SHARED, "patch", "merge", "frames")}
# Pixels of a picture after it was resized, the longest side of a fixed size, and tokens of a picture.
MOST_RESIZED, MOST_SIDE, MOST_TOKENS = 2**26, 2**14, 2**20
# Sides of a picture that differ by more are refused, as by the model's own processor.
MOST_ASPECT = 200


def opened(source: Any) -> Image.Image:
    """A picture, from a path or a Pillow image, as upright RGB."""
    try:
        return read_picture(source)
    except CalibrationError as error:
        raise RunnerError(error.what, error.where or "picture", error.do or "give another picture") from error


@dataclass(frozen=True)
class Pictures:
    """The settings of `pictures.json`; every one was checked.

    size: height and width; or the shortest edge alone; or the fewest and the most pixels, of patches. pad: the colour
    that fills up to a square. tokens: the visual tokens of a picture of fixed size.
    """

    kind: str
    resample: int
    size: tuple[int, ...] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    pad: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    tokens: int = 0
    patch: int = 1
    merge: int = 1
    frames: int = 1

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str) -> Pictures:
        """The settings; RunnerError for an unknown one, a missing one, or a value of another kind."""
        kind = settings.get("kind")
        if not isinstance(kind, str) or kind not in _OF_KIND:
            raise RunnerError(f"kind is {kind!r}"[:100], where, f"give one of {', '.join(_OF_KIND)}")
        if different := set(settings) ^ set(_OF_KIND[kind]):
            raise RunnerError(f"unknown or missing: {', '.join(sorted(different))}"[:200], where, NEW_FOLDER)
        number = _Settings(settings, where)
        most = MOST_RESIZED if kind == PATCHES_KIND else MOST_SIDE
        size = number.whole("size", most, (1, 2) if kind == FIXED else (2,))
        mean, std = number.real("mean", 3), number.real("std", 3)
        if (mean is None) != (std is None) or 0.0 in (std or ()) or (size is None and kind == PATCHES_KIND):
            raise RunnerError("mean, std and size do not belong together", where, NEW_FOLDER)
        shared: dict[str, Any] = {
            "kind": kind,
            "resample": whole(settings["resample"], "resample", 0, 5, where),
            "size": size,
            "rescale": (number.real("rescale", 0) or (None,))[0],
            "mean": mean,
            "std": std,
        }
        if kind == FIXED:
            return cls(
                **shared,
                pad=number.whole("pad", 255, (3,), 0),
                crop=number.whole("crop", MOST_SIDE, (2,)),
                tokens=whole(settings["tokens"], "tokens", 1, MOST_TOKENS, where),
            )
        sides = (whole(settings[name], name, 1, 2**10, where) for name in ("patch", "merge", "frames"))
        patch, merge, frames = sides
        return cls(**shared, patch=patch, merge=merge, frames=frames)

    def inputs(self, pictures: Sequence[Image.Image]) -> tuple[dict[str, Array], list[int]]:
        """What the graphs take of RGB pictures, and how many visual tokens each becomes."""
        if not pictures:
            return {}, []
        if self.kind == FIXED:
            return {PIXELS: np.stack([self._fixed(each) for each in pictures])}, [self.tokens] * len(pictures)
        parts = [self._patches(each) for each in pictures]
        grids = [(1, rows, columns) for _, rows, columns in parts]
        tokens = [rows * columns // self.merge**2 for _, rows, columns in parts]
        return {PIXELS: np.concatenate([part for part, *_ in parts]), GRID: np.array(grids, np.int64)}, tokens

    def _fixed(self, picture: Image.Image) -> Array:
        """f[3, H, W]"""
        if self.pad is not None and picture.width != picture.height:
            side = max(picture.size)
            square = Image.new("RGB", (side, side), self.pad)
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        if self.size is not None:
            width, height = picture.size
            short, long = sorted((width, height))
            if len(self.size) == 2:
                height, width = self.size
            else:
                reached = self.size[0], int(self.size[0] * long / short)
                width, height = reached if width <= height else reached[::-1]
            picture = self._resized(picture, width, height)
        pixels = np.asarray(picture).transpose(2, 0, 1)
        return self._normalized(pixels if self.crop is None else _cropped(pixels, *self.crop))

    def _patches(self, picture: Image.Image) -> tuple[Array, int, int]:
        """f[rows * columns, C] in blocks of merge x merge, as they are merged later; rows and columns of patches."""
        width, height = _whole_blocks(picture, self.patch * self.merge, *(self.size or (1, 1)))
        image = self._normalized(np.asarray(self._resized(picture, width, height)).transpose(2, 0, 1))
        patch, merge = self.patch, self.merge
        rows, columns = height // patch, width // patch
        blocks = image.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        blocks = np.broadcast_to(blocks, (*blocks.shape[:5], self.frames, patch, patch))
        return blocks.reshape(rows * columns, -1).astype(np.float32, copy=False), rows, columns

    def _resized(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        if width * height > MOST_RESIZED:
            what = f"a picture of {picture.width} x {picture.height} pixels would become {width} x {height}"
            raise RunnerError(what, "picture", f"cut it to a shape that needs at most {MOST_RESIZED} pixels")
        return picture.resize((width, height), resample=Image.Resampling(self.resample))

    def _normalized(self, pixels: Array) -> Array:
        """u8[3, H, W] -> f32[3, H, W]"""
        if self.rescale is not None:
            pixels = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        pixels = pixels.astype(np.float32, copy=False)
        if self.mean is None or self.std is None:
            return pixels
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        return (pixels - mean) / std


def _whole_blocks(picture: Image.Image, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Width and height, multiples of `side` of nearly the same aspect, with so many pixels in all."""
    width, height = picture.size
    if max(width, height) > MOST_ASPECT * min(width, height):
        what = f"a picture of {width} x {height} pixels is too long"
        raise RunnerError(what, "picture", f"give sides that differ by at most {MOST_ASPECT} times")
    sizes = [round(each / side) * side for each in (width, height)]
    if math.prod(sizes) > most:
        shrink = math.sqrt(width * height / most)
        sizes = [max(side, math.floor(each / shrink / side) * side) for each in (width, height)]
    elif math.prod(sizes) < fewest:
        grow = math.sqrt(fewest / (width * height))
        sizes = [math.ceil(each * grow / side) * side for each in (width, height)]
    return sizes[0], sizes[1]


def _cropped(pixels: Array, height: int, width: int) -> Array:
    """The middle of u8[3, H, W], with zeros around a picture that is smaller."""
    for axis, wanted in ((1, height), (2, width)):
        given = pixels.shape[axis]
        if given < wanted:
            before = math.ceil((wanted - given) / 2)
            around = [(0, 0)] * 3
            around[axis] = (before, wanted - given - before)
            pixels = np.pad(pixels, around)
        start = (pixels.shape[axis] - wanted) // 2
        pixels = pixels[:, start : start + wanted] if axis == 1 else pixels[:, :, start : start + wanted]
    return pixels


@dataclass(frozen=True)
class _Settings:
    """Reads lists of numbers, or null, of `pictures.json`."""

    settings: Mapping[str, Any]
    where: str

    def whole(self, name: str, most: int, lengths: Sequence[int], least: int = 1) -> tuple[int, ...] | None:
        """Whole numbers, as many as one of `lengths`."""
        value = self.settings[name]
        if value is None:
            return None
        if not isinstance(value, list) or len(value) not in lengths:
            raise self._wrong(name, value)
        return tuple(whole(each, name, least, most, self.where) for each in value)

    def real(self, name: str, length: int) -> tuple[float, ...] | None:
        """Finite numbers: a list of `length`, or a single number for 0."""
        value = self.settings[name]
        if value is None:
            return None
        listed = value if length else [value]
        if not isinstance(listed, list) or len(listed) != (length or 1):
            raise self._wrong(name, value)
        for each in listed:
            if isinstance(each, bool) or not isinstance(each, (int, float)) or not abs(each) <= 1e6:
                raise self._wrong(name, value)
        return tuple(map(float, listed))

    def _wrong(self, name: str, value: Any) -> RunnerError:
        return RunnerError(f"{name} is {value!r}"[:200], self.where, NEW_FOLDER)
