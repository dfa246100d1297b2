"""Picture reader: decode any supported file to upright 8-bit RGB, as image viewers show it.

- The EXIF orientation is applied. Of several frames or pages the first one is used.
- Transparent pixels are blended with white. Palette, CMYK, YCbCr and 1-bit pictures are converted by Pillow; embedded
  colour profiles are not applied.
- Greyscale with more than 8 bits is rescaled, where Pillow alone would clip at 255: 16 bits are divided by the range of
the type, 0..65535. Floats and 32-bit integers have no standard range: see `_eight_bits`.

A file is checked before it is opened and its size in pixels before it is decoded, so neither a pipe nor a decompression
bomb blocks the process.
"""

from __future__ import annotations

import io
import stat
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from qpcompile.errors import CalibrationError

# Formats that Pillow decodes itself. EPS and WMF are excluded: they are programs run by external interpreters.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
# Width times height. Twice Pillow's `MAX_IMAGE_PIXELS`, where Pillow itself raises an error: about 700 MB decoded.
MOST_PIXELS = 178_956_970
# EXIF orientation -> the transposition that makes the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN = 65535
# Modes with an alpha band.
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# TIFF tags: bits per sample; 0 if the smallest value is white.
_SAMPLE_BITS, _PHOTOMETRIC = 258, 262
_REPLACE = "replace the picture, or save it again as PNG or JPEG"


def read_picture(source: str | PathLike[str] | Image.Image, *, where: str | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, from a file or from an image in memory.

    Args:
        source: path of a picture file, or a Pillow image, which is not changed.
        where: where it is referenced (a line of a data folder), reported in errors with the path.

    Raises CalibrationError naming the file: missing, not a regular file, empty, not a picture, damaged, truncated, too
    large, or with non-finite values.
    """
    if isinstance(source, Image.Image):
        return _converted(source, "a picture in memory", where)
    name = str(source)
    with _opened(Path(source), where) as image:
        return _converted(image, name, where)


def read_picture_bytes(data: bytes, *, where: str) -> Image.Image:
    """The same for the content of a file; `where` is what errors call it."""
    if not data:
        raise _error("has no bytes", where, None, "send it again")
    with _headed(io.BytesIO(data), where, None) as image:
        return _converted(image, where, None)


def check_picture(path: Path, *, where: str | None = None) -> None:
    """The checks of `read_picture` on a file's kind and header, without decoding it."""
    with _opened(path, where):
        pass


def _opened(path: Path, where: str | None) -> Image.Image:
    """The picture with its header read and its size checked, not yet decoded."""
    _check_kind(path, where)
    return _headed(path, path, where)


def _headed(source: Path | io.BytesIO, path: str | Path, where: str | None) -> Image.Image:
    Image.init()
    try:
        image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _error(f"has too many pixels: {error}", path, where, "make it smaller first") from error
    except Exception as error:  # decoders raise arbitrary exceptions on damaged bytes
        raise _error(f"is not a picture that can be read: {_said(error)}", path, where, _REPLACE) from error
    if image.width * image.height > MOST_PIXELS or not image.width * image.height:
        image.close()
        what = f"is {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} in all are read, and at least one"
        raise _error(what, path, where, "make it smaller first")
    return image


def _check_kind(path: Path, where: str | None) -> None:
    """Refuse anything but a non-empty regular file: opening a pipe or a device may block forever."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise _error("is missing", path, where, "put the file there, or correct its path") from error
    except (OSError, ValueError) as error:
        raise _error(f"cannot be read: {_said(error)}", path, where, "correct its path or permissions") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise _error(f"is {kind}, not a picture file", path, where, "name a file")
    if not found.st_size:
        raise _error("is an empty file", path, where, "copy it again")


def _converted(image: Image.Image, name: str | Path, where: str | None) -> Image.Image:
    """Decode, convert and apply the orientation; decoder errors are reported with the picture's name."""
    try:
        image.load()
        # Invalid orientations and invalid EXIF data are ignored, as viewers do.
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        seen = _on_white(image)
        return seen if turn is None else seen.transpose(turn)
    except Exception as error:  # decoders raise arbitrary exceptions on damaged bytes
        raise _error(f"cannot be decoded: {_said(error)}", name, where, _REPLACE) from error


def _on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB, with transparency blended with white."""
    clear = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _eight_bits(values, image)
        if isinstance(clear, int):
            grey = np.where(values == clear, 255, grey)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    palette = image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"
    if clear is None and not palette and image.mode not in _WITH_ALPHA:
        return image.convert("RGB")
    # Pillow has no conversion from premultiplied grey to colour.
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _eight_bits(values: NDArray[Any], image: Image.Image) -> NDArray[Any]:
    """Rescale grey values of more than 8 bits to 0..255, not yet rounded: [H, W].

    16 bits: 0..65535 (of a 12-bit TIFF: 0..4095) become 0..255, the same for every picture. Others, by the first rule
    that holds for all values: floats in 0..1 are fractions of white; 0..255 are unchanged, as in Pillow; integers in
    0..65535 are 16 bits in a wider type; everything else is normalized from its own minimum to its own maximum.

    Raises ValueError for NaN and infinity.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = int(np.ravel(tags.get(_SAMPLE_BITS, 16))[0])
        grey = values.astype(np.float32) * 255 / (2**bits - 1)
        return np.rint(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are not finite")
    whole = np.issubdtype(values.dtype, np.integer)
    bottom, top = low, high
    if low >= 0 and high <= 1 and not whole:
        bottom, top = 0, 1
    elif low >= 0 and high <= 255:
        bottom, top = 0, 255
    elif low >= 0 and high <= 65535 and whole:
        bottom, top = 0, 65535
    return np.rint((values.astype(np.float64) - bottom) * (255 / ((top - bottom) or 1)))


def _error(problem: str, name: str | Path, where: str | None, do: str) -> CalibrationError:
    return CalibrationError(f"the picture {name} {problem}", where=where or str(name), do=do)


def _said(error: Exception) -> str:
    """The message of an exception, on one line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:300]
