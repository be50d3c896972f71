"""Turns undecoded pairs into a batch for the model: decodes and preprocesses images, draws and tokenizes captions."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from clipmap_hf.data.augment import Augmentation, SeededTransform
from clipmap_hf.data.captions import caption_text, draw_text, filled_texts
from clipmap_hf.data.columns import ERROR_COLUMN
from clipmap_hf.data.images import BadRowError, decode_image, image_bytes
from clipmap_hf.data.keys import content_key
from clipmap_hf.data.preprocess import preprocessed
from clipmap_hf.data.texts import Texts
from clipmap_hf.data.training_pixels import USUAL_DIVISOR, TrainingPixels, training_pixels


__all__ = [
    "NORMALIZATION",
    "PairCollator",
    "decoded",
    "normalized_pixels",
    "tokenized",
]

logger = logging.getLogger(__name__)

NORMALIZATION = ("image_mean", "image_std", "image_divisor")  # entries of training batches, for `normalized_pixels`


def tokenized(tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Tokenizes texts and truncates them to the tokenizer's `model_max_length`. If the tokenizer makes no mask, its model
    reads padding as well (SigLIP). Then each text is padded to the full length, and nothing is masked.

    Returns:
        `input_ids` and `attention_mask`, both `(texts, length)`.
    """
    padding = True if "attention_mask" in tokenizer.model_input_names else "max_length"
    ids = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids.get("attention_mask", torch.ones_like(ids["input_ids"])),
    }


def normalized_pixels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Returns the `pixel_values` of a batch, `(images, 3, height, width)`, as the model takes them. Training batches hold
    bytes, which are normalized here. Other batches are normalized already.
    """
    pixels = batch["pixel_values"]
    if pixels.dtype != torch.uint8:
        return pixels
    # Works in place: a new tensor of this size for each operation would take three times as long.
    mean, std = (batch[name][:, None, None] for name in ("image_mean", "image_std"))
    return pixels.float().div_(batch.get("image_divisor", USUAL_DIVISOR)).sub_(mean).div_(std)


def decoded(
    row: Mapping[str, Any], reduction: Callable[[tuple[int, int]], int] | None = None
) -> tuple[bytes, Image.Image]:
    """
    Returns the content of a row's image file, and the decoded image.

    Args:
        row: A row with an undecoded image.
        reduction: As in `decode_image`.

    Raises:
        BadRowError: If there is no image, if it cannot be decoded, or if the reader could not read the row.
    """
    if row.get(ERROR_COLUMN) is not None:
        raise BadRowError(row[ERROR_COLUMN])
    content = image_bytes(row["image"])
    return content, decode_image(content, reduction)


class _Example(NamedTuple):
    image: Image.Image
    texts: list[str]
    key: int
    view: int


@dataclass
class PairCollator:
    """
    Turns rows into a batch with the entries

    - `pixel_values`, `(images, 3, height, width)`; in training, these are bytes for `normalized_pixels`,
    - `input_ids` and `attention_mask`, `(texts, length)`, and `image_of_text`, `(texts,)`, if there are captions,
    - `bad_rows`, the number of rows left out, by reason. If no row is left, there is no other entry.

    In training, there is one text per image. In evaluation, all captions of the first caption column are kept. There
    are `image_key`, `(images,)`, equal for images of equal files, and `text_key`, `(texts,)`, equal for equal texts.

    In training, the crop and the caption depend only on `seed`, on the row, and on the number of the view. They are
    the same in any batch, order, process and worker. The number of the view is the row's `epoch`, modulo `views` if
    that is given.

    Args:
        tokenizer: The model's tokenizer. Captions are truncated to its `model_max_length`.
        image_processor: The model's image processor. Without an augmentation, it does all preprocessing. With an
            augmentation, which resizes and crops, the size, the filter and the normalization are the processor's.
        caption_columns: Columns of the captions: strings, or lists of strings, each a caption. Without columns, the
            batch has no texts.
        keyword_columns: Columns of keyword lists. A caption made of keywords joins a random number of them in random
            order.
        caption_sampling: `first` takes the first caption column. `random` draws a column of captions or keywords for
            each example.
        augmentation: Augmentation of training images; `None` in evaluation.
        seed: Seed of all random choices.
        views: Number of different examples of a row before they repeat; unlimited by default.
        texts: Texts to draw from in place of the row's own caption. Without captions among them, no column is read;
            with them, a row without a caption draws from the others.
        mixing: A `Mixing` of some examples with others, after their augmentation.
        teacher_cache: A `TeacherCache` that adds `teacher_embeds`, its teachers' embeddings of the same views.

    Raises:
        ValueError: If there is an augmentation, and training cannot do what the image processor does.
    """

    tokenizer: Any
    image_processor: Any
    caption_columns: Sequence[str] = ("caption",)
    keyword_columns: Sequence[str] = ()
    caption_sampling: Literal["first", "random"] = "first"
    augmentation: Augmentation | SeededTransform | None = None
    seed: int = 0
    views: int | None = None
    texts: Texts | None = None
    mixing: Any = None
    teacher_cache: Any = None
    pixels: TrainingPixels | None = field(init=False, default=None)

    def __post_init__(self):
        if self.augmentation is not None:
            self.pixels = training_pixels(self.image_processor)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        examples, bad = [], Counter()
        for row in rows:
            try:
                examples.append(self._example(row))
            except BadRowError as error:
                bad[error.reason] += 1
                logger.warning("Row left out: %s", error)
        return self.batch(examples) | {"bad_rows": dict(bad)} if examples else {"bad_rows": dict(bad)}

    def batch(self, examples: Sequence[_Example]) -> dict[str, Any]:
        """Collates examples, such as those that `view` makes."""
        if not self.caption_columns and self.texts is None:
            return self._pixels([example.image for example in examples])
        texts = [text for example in examples for text in example.texts]
        owners = [index for index, example in enumerate(examples) for _ in example.texts]
        batch = {
            **self._pixels([example.image for example in examples]),
            **tokenized(self.tokenizer, texts),
            "image_of_text": torch.tensor(owners),
        }
        if self.augmentation is None:
            batch["image_key"] = _signed([example.key for example in examples])
            batch["text_key"] = _signed([content_key(text) for text in texts])
        if self.teacher_cache is not None:
            keys, views = ([getattr(example, name) for example in examples] for name in ("key", "view"))
            batch["teacher_embeds"] = self.teacher_cache.lookup(keys, views, [content_key(text) for text in texts])
        return batch

    def decoded(self, row: Mapping[str, Any]) -> tuple[bytes, Image.Image]:
        """Decodes a row's image as `decoded` does; for an `Augmentation`, no larger than its crops need it."""
        if not isinstance(self.augmentation, Augmentation):  # a caller's transform may count pixels
            return decoded(row)
        return decoded(row, partial(self.augmentation.reduction, size=self.pixels.size))

    def view(self, row: Mapping[str, Any], content: bytes, image: Image.Image, view: int) -> _Example:
        """Makes a training example of a row, of whose image file, `content`, `decoded` has made `image`."""
        key = content_key(content)
        rng = random.Random(f"{self.seed}-{key}-{view}")
        # Before the caption is drawn: equal images get equal crops.
        augment = partial(self.augmentation, size=self.pixels.size, rng=rng, resample=self.pixels.resample)
        image = augment(image)
        if self.mixing is not None:
            image = self.mixing.image(image, lambda other: augment(self.decoded(other)[1]), rng)
        if not self.caption_columns and self.texts is None:
            return _Example(image, [], key, view)
        return _Example(image, [self.text(row, rng)], key, view)

    def _example(self, row: Mapping[str, Any]) -> _Example:
        content, image = self.decoded(row)
        if self.augmentation is not None:
            return self.view(row, content, image, row["epoch"] % self.views if self.views else row["epoch"])
        if self.texts is not None:  # to calibrate: one text, as in training
            key = content_key(content)
            return _Example(image, [self.text(row, random.Random(f"{self.seed}-{key}"))], key, 0)
        if not self.caption_columns:
            return _Example(image, [], 0, 0)
        captions = row[self.caption_columns[0]]
        return _Example(image, filled_texts(captions) or [caption_text(captions)], content_key(content), 0)

    def text(self, row: Mapping[str, Any], rng: random.Random) -> str:
        """Draws a text for a row, as in training; raises `BadRowError` where that is a caption, and it is blank."""
        if self.texts is not None and (text := self._drawn(row, rng)) is not None:
            return text
        caption = self._caption(row, rng)
        return caption if self.mixing is None else self.mixing.text(caption, partial(self._caption, rng=rng), rng)

    def _caption(self, row: Mapping[str, Any], rng: random.Random) -> str:
        first = row[self.caption_columns[0]]
        if self.caption_sampling == "first":
            return caption_text(draw_text(first, rng))
        columns = self._columns
        filled = [column for column in columns if filled_texts(row[column])]  # some rows have no keywords
        column = rng.choice(filled) if filled else columns[0]
        is_keywords = column in self.keyword_columns
        return caption_text(row[column] if is_keywords else draw_text(row[column], rng), rng)

    def _drawn(self, row: Mapping[str, Any], rng: random.Random) -> str | None:
        """A text that is drawn; `None` for the row's own caption, in whose place a row without one draws another."""
        text = self.texts.draw(rng)
        if text is None and not any(filled_texts(row.get(name)) for name in self._columns):
            return self.texts.draw(rng, captions=False)
        return text

    @property
    def _columns(self) -> list[str]:
        return [*self.caption_columns, *self.keyword_columns]

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.augmentation is None:
            return {"pixel_values": preprocessed(self.image_processor, images)}
        if isinstance(images[0], torch.Tensor):  # of a caller's transform, which has normalized them
            return {"pixel_values": torch.stack(images).float()}
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (images, height, width, 3)
        batch = {
            "pixel_values": pixels.permute(0, 3, 1, 2).contiguous(),
            "image_mean": torch.tensor(self.pixels.mean, dtype=torch.float32),
            "image_std": torch.tensor(self.pixels.std, dtype=torch.float32),
        }
        # The usual one is a plain number: by a tensor on the device, GPUs divide in another way, to other last bits.
        unusual = self.pixels.divisor != USUAL_DIVISOR
        return batch | ({"image_divisor": torch.tensor(self.pixels.divisor)} if unusual else {})


def _signed(keys: Sequence[int]) -> torch.Tensor:
    """Keys of 64 bits as torch holds them."""
    return torch.tensor([key - 2**63 for key in keys])
