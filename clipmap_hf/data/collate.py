"""From undecoded pairs to a model batch: decode, augment or preprocess, draw a caption, tokenize."""

import io
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from clipmap_hf.data.augment import Augmentation


__all__ = ["BadRowError", "PairCollator", "caption_text", "decode_image", "filled_texts"]

logger = logging.getLogger(__name__)

_BAD_IMAGE = (
    OSError,
    UnidentifiedImageError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # what Pillow raises


class BadRowError(ValueError):
    """A row that cannot become a training pair; the message says why."""


def decode_image(image: dict[str, Any] | Image.Image) -> Image.Image:
    """
    Decodes an undecoded `datasets` image (`{"bytes", "path"}`) to RGB; transparency becomes white.

    Raises:
        BadRowError: If it is missing, truncated or not an image.
    """
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        if image.mode.startswith("I;16"):  # Pillow would clip to 255, that is turn nearly everything white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (*_BAD_IMAGE, AttributeError, TypeError) as error:  # the last two: neither bytes nor path
        raise BadRowError(f"undecodable image: {error}") from error


def filled_texts(caption: Any) -> list[str]:
    """The strings of a caption, which may be one or a list, that are not blank."""
    texts = caption if isinstance(caption, list) else [caption]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def caption_text(caption: str | list[str] | None, rng: random.Random | None = None) -> str:
    """
    A caption as one string. A list (keywords) is joined by commas, with `rng` in random order and random number.

    Raises:
        BadRowError: If there is no text.
    """
    words = filled_texts(caption)
    if not words:
        raise BadRowError(f"no caption: {caption!r}")
    if isinstance(caption, str):
        return caption
    if rng is not None:
        words = rng.sample(words, k=rng.randint(1, len(words)))
    return ", ".join(words)


@dataclass
class PairCollator:
    """
    Turns rows of a `PairDataset` into `pixel_values (batch, 3, size, size)`, `input_ids` and `attention_mask`
    `(texts, length)`, `image_of_text` `(texts,)`, and the number of `bad_rows` that were left out. In training there
    is one text per image; in evaluation all captions of the first column are kept.

    Args:
        tokenizer: The model's tokenizer; captions are truncated to its `model_max_length`.
        image_processor: The model's image processor. Without `augmentation` it does all preprocessing; with one, it
            gives size, mean and standard deviation.
        caption_columns: Columns of the captions: strings, or lists of strings, each a caption.
        keyword_columns: Columns of keyword lists, of which training makes a caption in random order and number.
        caption_sampling: `first` takes the first caption column, `random` draws one of all columns per example.
        augmentation: Applied to training images; `None` in evaluation.
        seed: With a row's `key`, seeds its augmentation and caption, independent of batch, process and worker.
    """

    tokenizer: Any
    image_processor: Any
    caption_columns: Sequence[str] = ("caption",)
    keyword_columns: Sequence[str] = ()
    caption_sampling: Literal["first", "random"] = "first"
    augmentation: Augmentation | None = None
    seed: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images, captions, owners, bad = [], [], [], []
        for row in rows:
            rng = random.Random(f"{self.seed}-{row.get('key')}")
            try:
                image, texts = decode_image(row["image"]), self._texts(row, rng)
            except BadRowError as error:
                bad.append(str(error))
                continue
            captions += texts
            owners += [len(images)] * len(texts)
            images.append(image if self.augmentation is None else self.augmentation(image, self.size, rng))
        for reason in bad:
            logger.warning("Row left out: %s", reason)
        if not images:
            raise BadRowError(f"None of the {len(rows)} rows of this batch can be used; the last: {bad[-1]}")
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return {
            "pixel_values": self._pixels(images),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_of_text": torch.tensor(owners),
            "bad_rows": len(bad),
        }

    @property
    def size(self) -> int:
        """Side of the square crop, in pixels."""
        size = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        return size["height"] if "height" in size else size["shortest_edge"]

    def _texts(self, row: dict[str, Any], rng: random.Random) -> list[str]:
        first = row[self.caption_columns[0]]
        if self.augmentation is None:
            return filled_texts(first) or [caption_text(first)]
        if self.caption_sampling == "first":
            return [caption_text(_one_of(first, rng))]
        columns = [*self.caption_columns, *self.keyword_columns]
        filled = [column for column in columns if filled_texts(row[column])]  # some rows have no keywords
        column = rng.choice(filled) if filled else columns[0]
        is_keywords = column in self.keyword_columns
        return [caption_text(row[column] if is_keywords else _one_of(row[column], rng), rng)]

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        if self.augmentation is None:
            return self.image_processor(images, return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (batch, size, size, 3)
        mean, std = (torch.tensor(x) for x in (self.image_processor.image_mean, self.image_processor.image_std))
        return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _one_of(caption: str | list[str], rng: random.Random) -> str | None:
    texts = filled_texts(caption)
    return rng.choice(texts) if texts else None
