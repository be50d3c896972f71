"""From an undecoded image to RGB pixels, whatever mode it is stored in; what cannot be decoded is a `BadRowError`."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


__all__ = ["BadRowError", "decode_image", "image_bytes"]

# What Pillow raises for broken files: OSError, ValueError and SyntaxError as documented, RuntimeError for AVIF and for
# pixel formats that it does not know.
_UNDECODABLE = (OSError, ValueError, SyntaxError, RuntimeError)


class BadRowError(ValueError):
    """
    A row that cannot become a training pair.

    Args:
        reason: What is wrong, in a few words that many rows share; rows are counted by it.
        detail: What is wrong with this row.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason


def image_bytes(image: dict[str, Any] | None) -> bytes:
    """
    The file of an undecoded `datasets` image (`{"bytes", "path"}`), read if only its path is given.

    Raises:
        BadRowError: If there is none, or it is empty or unreadable.
    """
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except (KeyError, TypeError) as error:  # no dict, no bytes and no path
        raise BadRowError("no image", repr(image)[:200]) from error
    except OSError as error:
        raise BadRowError("unreadable image", error) from error
    if not content:
        raise BadRowError("empty image", image.get("path") or "")
    return content


def decode_image(content: bytes) -> Image.Image:
    """
    Decodes an image file to RGB: turned upright by its EXIF, transparency on white, the first frame of an animation.
    Numbers of more than 8 bits are scaled to 8.

    Raises:
        BadRowError: If it is truncated, no image, or so large that decoding it would be an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # among millions of files, every oddity that Pillow knows of
            return _rgb(content)
    except Image.DecompressionBombError as error:
        raise BadRowError("decompression bomb", error) from error
    except _UNDECODABLE as error:
        raise BadRowError("undecodable image", error) from error


def _rgb(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # Pillow would clip to 255, that is turn nearly everything white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            image = _scaled(np.asarray(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _scaled(values: np.ndarray) -> Image.Image:
    """Gray numbers whose scale the file does not say: the largest becomes white, zero or the smallest black."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low = min(values.min(), 0.0)
    return Image.fromarray(((values - low) * (255 / max(values.max() - low, 1e-30))).astype(np.uint8))
