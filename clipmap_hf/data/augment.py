"""Augments PIL images for training; all augmentations are pure functions of an image and a random generator."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


__all__ = ["Augmentation", "SeededTransform", "random_resized_crop"]

_LEAST_CROP = 1.5  # times the size that it is resized to: a scaled JPEG may not make it smaller


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: random.Random,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """
    Crops a random box and resizes it, in one step. Up to ten boxes are drawn until one of them fits into
    the image. If none fits, the last box is clipped to the image.

    Args:
        image: The image.
        size: Height and width of the result, in pixels.
        scale: Smallest and largest area of the box, as fractions of the image's area.
        ratio: Smallest and largest aspect ratio of the box, width over height. It is drawn log-uniformly.
        rng: Random generator.
        resample: Filter that resizes the box.
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
    return image.resize(size[::-1], resample, box=box)


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
        scaled: Whether large JPEGs may be decoded at a half, a quarter or an eighth of their size, which takes a
            fraction of the time. Any crop still has 1.5 times the height and width that it is resized to.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0
    scaled: bool = True

    def reduction(self, image_size: tuple[int, int], size: tuple[int, int]) -> int:
        """
        Returns how many times smaller an image may be decoded: 1, 2, 4 or 8.

        Args:
            image_size: Width and height of the image.
            size: Height and width that crops are resized to.
        """
        if not self.scaled:
            return 1
        area = self.scale[0] * math.prod(image_size)
        squares = (area * self.ratio[0], area / self.ratio[1])  # of the least width and height of a crop
        least = [min(side, math.sqrt(square)) for side, square in zip(image_size, squares, strict=True)]
        factor = min(crop / (_LEAST_CROP * side) for crop, side in zip(least, size[::-1], strict=True))
        return next((scale for scale in (8, 4, 2) if factor >= scale), 1)

    def __call__(
        self,
        image: Image.Image,
        size: tuple[int, int],
        rng: random.Random,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Image.Image:
        """Returns an RGB image whose height and width are `size`. Equal states of `rng` give equal pixels."""
        if self.rotation:
            angle = rng.uniform(-self.rotation, self.rotation)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
        image = random_resized_crop(image, size, self.scale, self.ratio, rng, resample)
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
        if self.color_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        if rng.random() < self.grayscale:
            image = ImageOps.grayscale(image).convert("RGB")
        return image


@dataclass(frozen=True)
class SeededTransform:
    """
    A caller's own transform in place of `Augmentation`. For each image, the generators of `random`, numpy and torch
    are seeded before it and put back after it, so that it is a pure function too.

    Args:
        transform: Takes an RGB image. Returns such an image, of the model's input size, or a float tensor
            `(3, height, width)` that is normalized already, as torchvision's transforms do.
    """

    transform: Callable[[Image.Image], Any]

    def __call__(
        self, image: Image.Image, size: tuple[int, int], rng: random.Random, resample: Image.Resampling | None = None
    ) -> Image.Image | torch.Tensor:
        """
        Returns what the transform makes of an image. Its height and width must be `size`. Whether the filter
        `resample` made it so is the transform's business.

        Raises:
            TypeError: If it is neither an image nor a tensor of floats.
            ValueError: If it has another size.
        """
        seed, states = rng.getrandbits(32), (random.getstate(), np.random.get_state())
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(seed), np.random.seed(seed), torch.random.default_generator.manual_seed(seed)
                found = self.transform(image)
        finally:
            random.setstate(states[0]), np.random.set_state(states[1])
        if not isinstance(found, (Image.Image, torch.Tensor)):
            raise TypeError(f"transform must return an image or a tensor, got a {type(found).__name__}.")
        if isinstance(found, torch.Tensor) and not found.is_floating_point():
            raise TypeError(
                "transform must return an image, or a tensor of floats, which is normalized already; got one of "
                f"{found.dtype}."
            )
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else (3, *found.size[::-1])
        if shape != (3, *size):
            raise ValueError(f"transform must return images of the shape {(3, *size)}, got {shape}.")
        return found if isinstance(found, torch.Tensor) else found.convert("RGB")
