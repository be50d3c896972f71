"""Augments PIL images for training; all augmentations are pure functions of an image and a random generator."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps


__all__ = ["Augmentation", "random_resized_crop"]


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Image.Image:
    """
    Crops a random box and resizes it bicubically, in one step. Up to ten boxes are drawn until one of them fits into
    the image. If none fits, the last box is clipped to the image.

    Args:
        image: The image.
        size: Side of the resulting square, in pixels.
        scale: Smallest and largest area of the box, as fractions of the image's area.
        ratio: Smallest and largest aspect ratio of the box, width over height. It is drawn log-uniformly.
        rng: Random generator.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            break
    box_width, box_height = min(box_width, width), min(box_height, height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    box = (left, top, left + box_width, top + box_height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class Augmentation:
    """
    A random rotation, a random resized crop, a horizontal flip, color jitter and grayscale, in this order. By default,
    there is only the crop.

    Args:
        scale: Smallest and largest area of the crop, as fractions of the image's area.
        ratio: Smallest and largest aspect ratio of the crop, width over height.
        flip: Probability of a horizontal flip.
        rotation: Largest angle of a random rotation, in degrees. Corners are filled with white.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        grayscale: Probability of turning an image gray.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def __call__(self, image: Image.Image, size: int, rng: random.Random) -> Image.Image:
        """Returns an RGB image of `(size, size)` pixels. Equal states of `rng` give equal pixels."""
        if self.rotation:
            angle = rng.uniform(-self.rotation, self.rotation)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
        image = random_resized_crop(image, size, self.scale, self.ratio, rng)
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
        if self.color_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        if rng.random() < self.grayscale:
            image = ImageOps.grayscale(image).convert("RGB")
        return image
