"""From undecoded pairs to a model batch: decode, augment or preprocess, draw a caption, tokenize."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.images import BadRowError, decode_image, image_bytes


__all__ = ["PairCollator", "caption_text", "content_key", "decoded", "filled_texts", "normalized_pixels", "tokenized"]

logger = logging.getLogger(__name__)


def content_key(content: bytes | str) -> int:
    """64 bits that name an image file or a text by its content, the same wherever it is stored."""
    content = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


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
        raise BadRowError("no caption", repr(caption))
    if isinstance(caption, str):
        return caption
    if rng is not None:
        words = rng.sample(words, k=rng.randint(1, len(words)))
    return ", ".join(words)


def tokenized(tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    `input_ids` and `attention_mask`, `(texts, length)`, truncated to `model_max_length`. A tokenizer that gives no
    mask is that of a model that reads its padding (SigLIP): each text has the full length, and nothing is masked.
    """
    padding = True if "attention_mask" in tokenizer.model_input_names else "max_length"
    ids = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids.get("attention_mask", torch.ones_like(ids["input_ids"])),
    }


def normalized_pixels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The `pixel_values` of a batch, `(images, 3, size, size)`, as the model takes them; training ships bytes."""
    pixels = batch["pixel_values"]
    if pixels.dtype != torch.uint8:
        return pixels
    # In place, for a fresh tensor of this size at every step of the way takes three times as long.
    mean, std = (batch[name][:, None, None] for name in ("image_mean", "image_std"))
    return pixels.float().div_(255).sub_(mean).div_(std)


def decoded(row: Mapping[str, Any]) -> tuple[bytes, Image.Image]:
    """
    The image file of a row, and its image.

    Raises:
        BadRowError: If there is none, or the reader could not read the row.
    """
    if row.get("error") is not None:
        raise BadRowError(row["error"])
    content = image_bytes(row["image"])
    return content, decode_image(content)


class _Example(NamedTuple):
    image: Image.Image
    texts: list[str]
    key: int
    view: int


@dataclass
class PairCollator:
    """
    Turns rows into `pixel_values (images, 3, size, size)`, `input_ids` and `attention_mask` `(texts, length)`,
    `image_of_text` `(texts,)`, and `bad_rows`, the number of rows left out by reason; nothing but that if no row is
    left. In training there is one text per image, and the pixels are bytes that `normalized_pixels` reads; in
    evaluation all captions of the first column are kept, and without caption columns there are just the pixels.

    In training, crop and caption are functions of `seed`, the row, and the view, which is the row's `epoch`, or its
    remainder by `views`: they are the same in any batch, order, process and worker.

    Args:
        tokenizer: The model's tokenizer; captions are truncated to its `model_max_length`.
        image_processor: The model's image processor. Without `augmentation` it does all preprocessing; with one, it
            gives size, mean and standard deviation.
        caption_columns: Columns of the captions: strings, or lists of strings, each a caption.
        keyword_columns: Columns of keyword lists, of which training makes a caption in random order and number.
        caption_sampling: `first` takes the first caption column, `random` draws one of all columns per example.
        augmentation: Applied to training images; `None` in evaluation.
        seed: Of everything random.
        views: How many different examples to make of a row before they repeat; unlimited by default.
        teacher_cache: A `TeacherCache` that adds `teacher_embeds`, what its teachers made of the same views.
    """

    tokenizer: Any
    image_processor: Any
    caption_columns: Sequence[str] = ("caption",)
    keyword_columns: Sequence[str] = ()
    caption_sampling: Literal["first", "random"] = "first"
    augmentation: Augmentation | None = None
    seed: int = 0
    views: int | None = None
    teacher_cache: Any = None

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
        """The tensors of `examples`, as `view` makes them."""
        if not self.caption_columns:
            return self._pixels([example.image for example in examples])
        texts = [text for example in examples for text in example.texts]
        owners = [index for index, example in enumerate(examples) for _ in example.texts]
        batch = {
            **self._pixels([example.image for example in examples]),
            **tokenized(self.tokenizer, texts),
            "image_of_text": torch.tensor(owners),
        }
        if self.teacher_cache is not None:
            keys, views = ([getattr(example, name) for example in examples] for name in ("key", "view"))
            batch["teacher_embeds"] = self.teacher_cache.lookup(keys, views, [content_key(text) for text in texts])
        return batch

    def view(self, row: Mapping[str, Any], content: bytes, image: Image.Image, view: int) -> _Example:
        """A training example of a row whose image file `content` was decoded to `image`."""
        key = content_key(content)
        rng = random.Random(f"{self.seed}-{key}-{view}")
        image = self.augmentation(image, self.size, rng)  # first: rows of one image may draw among other captions
        return _Example(image, self._texts(row, rng), key, view)

    @property
    def size(self) -> int:
        """Side of the square crop, in pixels."""
        size = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        return size["height"] if "height" in size else size["shortest_edge"]

    def _example(self, row: Mapping[str, Any]) -> _Example:
        content, image = decoded(row)
        if self.augmentation is not None:
            return self.view(row, content, image, row["epoch"] % self.views if self.views else row["epoch"])
        if not self.caption_columns:
            return _Example(image, [], 0, 0)
        captions = row[self.caption_columns[0]]
        return _Example(image, filled_texts(captions) or [caption_text(captions)], 0, 0)

    def _texts(self, row: Mapping[str, Any], rng: random.Random) -> list[str]:
        first = row[self.caption_columns[0]]
        if self.caption_sampling == "first":
            return [caption_text(_one_of(first, rng))]
        columns = [*self.caption_columns, *self.keyword_columns]
        filled = [column for column in columns if filled_texts(row[column])]  # some rows have no keywords
        column = rng.choice(filled) if filled else columns[0]
        is_keywords = column in self.keyword_columns
        return [caption_text(row[column] if is_keywords else _one_of(row[column], rng), rng)]

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.augmentation is None:
            return {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (images, size, size, 3)
        return {
            "pixel_values": pixels.permute(0, 3, 1, 2).contiguous(),
            "image_mean": torch.tensor(self.image_processor.image_mean),
            "image_std": torch.tensor(self.image_processor.image_std),
        }


def _one_of(caption: str | list[str], rng: random.Random) -> str | None:
    texts = filled_texts(caption)
    return rng.choice(texts) if texts else None
