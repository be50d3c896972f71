"""Mixes training examples two by two, so that few of them give many that the teacher can answer for."""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset
from PIL import Image

from clipmap_hf.data.images import BadRowError, image_bytes
from clipmap_hf.data.keys import content_key


__all__ = ["Mixing", "cutmix", "mixed_text", "mixup"]


def mixup(image: Image.Image, other: Image.Image, share: float) -> Image.Image:
    """
    Blends two images of equal size (arXiv 1710.09412).

    Args:
        image: The image.
        other: What it is mixed with.
        share: How much of the result is the image, between 0 and 1.
    """
    return Image.blend(other, image, share)


def cutmix(image: Image.Image, other: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """
    Puts a box of another image of equal size, at the same place, over an image (arXiv 1905.04899).

    Args:
        image: The image.
        other: What the box is taken from.
        share: How much of the area stays, between 0 and 1. The box has the shape of the image.
        rng: Random generator of the place.
    """
    width, height = (round(side * math.sqrt(1 - share)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    mixed = image.copy()
    mixed.paste(other.crop((left, top, left + width, top + height)), (left, top))
    return mixed


def mixed_text(texts: Sequence[str], rng: random.Random) -> str:
    """
    Joins words of some texts. Of each text, some of the words that stand side by side are taken.

    Args:
        texts: The texts, in order.
        rng: Random generator.
    """
    parts = []
    for text in texts:
        words = text.split()
        count = rng.randint(1, len(words))
        first = rng.randint(0, len(words) - count)
        parts.append(" ".join(words[first : first + count]))
    return rng.choice((" ", ", ")).join(parts)


@dataclass(frozen=True)
class Mixing:
    """
    Mixes some images with another one by `mixup` or `cutmix`, and some captions with another one or none by
    `mixed_text`. The teacher embeds the mix itself, so no target has to be made up (arXiv 2106.05237).

    Args:
        probability: How many of the images, and of the captions, are mixed.
        partners: Rows with undecoded images, one of which is drawn. What cannot be read there leaves an example as it
            is.
    """

    probability: float
    partners: Dataset

    def image(
        self, image: Image.Image, image_of: Callable[[Mapping[str, Any]], Image.Image], rng: random.Random
    ) -> Image.Image:
        """
        Mixes an image, or returns it as it is.

        Args:
            image: An augmented image.
            image_of: Decodes and augments the image of a row.
            rng: Random generator of all draws.
        """
        if rng.random() >= self.probability:
            return image
        try:
            other = image_of(self._partner(rng))
        except BadRowError:  # which is counted when the row's own turn comes
            return image
        share = rng.random()
        return mixup(image, other, share) if rng.random() < 0.5 else cutmix(image, other, share, rng)

    def text(self, caption: str, caption_of: Callable[[Mapping[str, Any]], str], rng: random.Random) -> str:
        """
        Mixes a caption, or returns it as it is.

        Args:
            caption: A text with words.
            caption_of: Draws the caption of a row.
            rng: Random generator of all draws.
        """
        if rng.random() >= self.probability:
            return caption
        if rng.random() < 1 / 3:
            return mixed_text([caption], rng)
        try:
            return mixed_text([caption, caption_of(self._partner(rng))], rng)
        except BadRowError:
            return caption

    def _partner(self, rng: random.Random) -> Mapping[str, Any]:
        return self.partners[rng.randrange(len(self.partners))]

    @cached_property
    def digest(self) -> str:
        """Tells these mixes from others: they change when rows are added, removed or put into another order."""
        digest = hashlib.sha256(str(self.probability).encode())
        for row in self.partners.select_columns("image"):
            digest.update(f"{_key(row)}".encode())
        return digest.hexdigest()


def _key(row: Mapping[str, Any]) -> int | None:
    try:
        return content_key(image_bytes(row["image"]))
    except BadRowError:
        return None
