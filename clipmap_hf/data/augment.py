"""Training augmentations on PIL images, each a pure function of (image, random generator)."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps


__all__ = ["Augmentation", "random_resized_crop"]


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Image.Image:
    """
    Crops a random box of `scale` times the image's area and a log-uniform aspect `ratio`, and resizes it to
    `(size, size)` bicubically in one step. After ten boxes that do not fit, the last is clipped to the image's sides.
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
    Random resized crop, then, where asked, horizontal flip, rotation, color jitter and grayscale.

    Args:
        scale: Range of the crop's area, as a fraction of the image's.
        ratio: Range of the crop's aspect ratio, width over height.
        flip: Probability of a horizontal flip.
        rotation: Largest angle of a random rotation, in degrees; corners are filled with white.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        grayscale: Probability of dropping all color.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def __call__(self, image: Image.Image, size: int, rng: random.Random) -> Image.Image:
        """Returns an RGB image of `(size, size)` pixels; equal states of `rng` give equal pixels."""
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
