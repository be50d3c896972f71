"""Decodes images of any mode to RGB pixels, and raises a `BadRowError` for images that cannot be decoded."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import ExifTags, Image


__all__ = ["BadRowError", "decode_image", "image_bytes"]

_SCALED = ("JPEG", "MPO")  # formats of which Pillow can decode smaller images; cameras write MPO too

# What turns an image of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadRowError(ValueError):
    """
    A row that cannot become a training pair.

    Args:
        reason: The kind of error, in a few words that many rows share. Rows are counted by reason.
        detail: The details of this row's error.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason


def image_bytes(image: dict[str, Any] | None) -> bytes:
    """
    Returns the content of an undecoded `datasets` image (`{"bytes", "path"}`). If only the path is given, the file is
    read, also one in an archive (`zip://a.png::pairs.zip`) or on the Hub (`hf://datasets/…`).

    Raises:
        BadRowError: If there is no image, or it is empty or unreadable.
    """
    try:
        content = image["bytes"] if image["bytes"] is not None else _file_content(image["path"])
    except (KeyError, TypeError) as error:  # no dict, no bytes and no path
        raise BadRowError("no image", repr(image)[:200]) from error
    if not isinstance(content, bytes):
        raise BadRowError("no image", repr(image)[:200])
    if not content:
        raise BadRowError("empty image", image.get("path") or "")
    return content


def _file_content(path: str) -> bytes:
    if path is None:
        raise TypeError("an image has neither bytes nor a path")
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        with fsspec.open(path) as file:
            return file.read()
    except Exception as error:  # file systems and archives raise errors of many kinds
        raise BadRowError("unreadable image", error) from error


def decode_image(content: bytes, reduction: Callable[[tuple[int, int]], int] | None = None) -> Image.Image:
    """
    Decodes an image file to RGB. The image is turned upright as its EXIF data says, and transparent pixels are laid on
    white. Of an animation, the first frame is taken. Values of more than 8 bits are scaled to 8 bits. Of EXIF data,
    only the orientation is read. If it cannot be read, the image is taken as it is stored.

    Args:
        content: Content of the file.
        reduction: From width and height to how many times smaller, 1, 2, 4 or 8, a JPEG is decoded. Other formats are
            always decoded in full, and so is a JPEG by default.

    Raises:
        BadRowError: If the file is truncated, is no image, or has so many pixels that it may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # millions of files would trigger all warnings that Pillow has
            return _rgb(content, reduction)
    except Image.DecompressionBombError as error:
        raise BadRowError("decompression bomb", error) from error
    except Exception as error:  # Pillow documents three kinds; decoders raise more, even a MemoryError
        raise BadRowError("undecodable image", error) from error


def _rgb(content: bytes, reduction: Callable[[tuple[int, int]], int] | None) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        if reduction is not None and image.format in _SCALED:
            # Either way round: whether the image lies on its side is known later.
            factor = min(reduction(size) for size in (image.size, image.size[::-1]))
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()  # before its EXIF data is read: some formats have that at the end
        image = _turned_upright(image)
        if image.mode.startswith("I;16"):  # Pillow would clip values to 255, which turns nearly all pixels white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            image = _scale_to_8_bits(np.asarray(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _turned_upright(image: Image.Image) -> Image.Image:
    """`ImageOps.exif_transpose` would write the other tags anew, and so fail if one of them is malformed."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many kinds as there are malformed headers; the pixels are good, which have been decoded
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _scale_to_8_bits(values: np.ndarray) -> Image.Image:
    """Scales gray values of unknown range: the largest becomes white, and zero or a negative smallest value black."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low = min(values.min(), 0.0)
    return Image.fromarray(((values - low) * (255 / max(values.max() - low, 1e-30))).astype(np.uint8))
