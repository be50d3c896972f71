"""Preprocesses images with the model's image processor, in little memory even if they are very thin."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


__all__ = ["preprocessed"]

_LONG = 16  # in short sides; images of usual shapes are shorter


def preprocessed(image_processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """
    Returns the `pixel_values` that an image processor makes of RGB images, `(images, 3, height, width)`.

    Many processors enlarge an image until its short side has the model's size, and then crop the center. Of 1 × 4000
    pixels, they would make 224 × 896,000. So an image that is 18 times as long as wide, or longer, is first cut to its
    center, 16 to 18 times as long as wide. The pixels are the same if the processor does not round the long side. If
    it does, they come from places that differ by up to 3 % of a pixel.

    Args:
        image_processor: The model's image processor.
        images: RGB images of any size.
    """
    if _crops_what_it_enlarges(image_processor):
        images = [_center(image) for image in images]
    return image_processor(images, return_tensors="pt")["pixel_values"]


def _crops_what_it_enlarges(image_processor: Any) -> bool:
    resizes_short_side = image_processor.do_resize and list(dict(image_processor.size)) == ["shortest_edge"]
    return bool(resizes_short_side and image_processor.do_center_crop)


def _center(image: Image.Image) -> Image.Image:
    """Cuts whole short sides off both ends, so that the processor resizes what is left from the same positions."""
    short, long = sorted(image.size)
    cut = max(0, (long - _LONG * short) // (2 * short)) * short
    if not cut:
        return image
    left, top = (cut, 0) if image.width == long else (0, cut)
    return image.crop((left, top, image.width - left, image.height - top))
