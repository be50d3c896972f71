"""Batches of calibration pairs: a sample of a data set, the same in every iteration."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from torch.utils.data import DataLoader

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import NORMALIZATION, PairCollator, normalized_pixels, tokenized
from clipmap_hf.data.columns import ERROR_COLUMN, split_names, undecoded
from clipmap_hf.data.further_texts import further_texts
from clipmap_hf.data.pairs import PairSource, given_pairs, load_pairs, pairs_or_images
from clipmap_hf.data.tally import RowTally
from clipmap_hf.data.texts import Texts
from clipmap_hf.distributed import process_count, process_index


__all__ = ["CROPS", "MORE_TEXTS", "CalibrationPairs", "calibration_rows", "sampled_pairs"]

logger = logging.getLogger(__name__)

_BATCH_SIZE = 64
_VIEWS = 8  # of an image, its first without augmentation

CROPS = Augmentation(scale=(0.7, 1.0), scaled=False)
MORE_TEXTS = 3  # for each pair, texts that belong to none, where there are so many


class CalibrationPairs:
    """
    Iterates over batches of `pixel_values` and, if there are captions, `input_ids`. Each process has its own pairs.

    Args:
        rows: A data set. With random access, pairs are drawn at random. From a stream, the first pairs are taken.
        processor: The model's `CLIPProcessor`.
        pairs: Number of pairs to take, of all processes together. If there are fewer, all are taken.
        max_bad_fraction: Share of the rows that may be unusable, as in `RowTally`.
        seed: Seed of the draw.
        image_column: Column of the images.
        caption_column: Column of the captions; `None` if there are none, so that texts are made up.
        texts: Texts to draw from beside the captions or in place of them, as in training.
        augmentation: Makes more of too few pairs: up to seven augmented views of each, with texts of their own draw.
            By default, there is one view of each, which is not augmented.
        more_texts: Further texts, of no pair. Each batch has some of them behind its own.

    Raises:
        ValueError: If a column is missing, or there are fewer pairs than processes. While iterating, if too many rows
            are unusable.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        processor: Any,
        pairs: int,
        max_bad_fraction: float = 0.01,
        seed: int = 0,
        image_column: str = "image",
        caption_column: str | None = "caption",
        texts: Texts | None = None,
        augmentation: Augmentation | None = None,
        more_texts: Sequence[str] = (),
    ):
        columns = rows.column_names or ()
        captions = [] if caption_column is None else [caption_column]
        if captions and columns and caption_column not in columns:
            raise ValueError(
                f"The calibration data has no column {caption_column!r}; it has {columns}. Name the column of the "
                "captions by caption_column, or give caption_column=None to calibrate with random texts."
            )
        others = [*captions, *([ERROR_COLUMN] if ERROR_COLUMN in columns else [])]
        rows = undecoded(rows, "The calibration data", image_column, others)
        if isinstance(rows, Dataset):
            rows = rows.shuffle(seed=seed).select(range(min(pairs, len(rows))))
        else:
            rows = Dataset.from_list(list(rows.take(pairs)), features=rows.features)
        if len(rows) < process_count():
            raise ValueError(
                f"The calibration data has {len(rows)} pairs, fewer than the {process_count()} processes."
            )
        self.rows = rows.shard(process_count(), process_index(), contiguous=True)
        self.collator = PairCollator(processor.tokenizer, processor.image_processor, captions, seed=seed, texts=texts)
        self.views = min(_VIEWS, -(-pairs // len(rows))) if augmentation else 1
        self.augmented = replace(self.collator, augmentation=augmentation) if self.views > 1 else None
        self.number = min(-(-pairs // process_count()), self.views * len(self.rows))
        self.max_bad_fraction = max_bad_fraction
        self.more_texts = more_texts[process_index() :: process_count()]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tally = RowTally(self.max_bad_fraction)
        counts = [min(len(self.rows), self.number - view * len(self.rows)) for view in range(self.views)]
        batches, index = sum(-(-count // _BATCH_SIZE) for count in counts), 0
        for view, count in enumerate(counts):
            rows = self.rows.select(range(count))
            for batch in DataLoader(rows, _BATCH_SIZE, collate_fn=partial(self._collated, view)):
                bad = batch.pop("bad_rows")
                if not view:  # what is bad in one view is bad in all
                    tally.add(len(batch.get("pixel_values", ())) + sum(bad.values()), bad)
                if batch:
                    yield self._with_texts(batch, self.more_texts[index::batches])
                index += 1

    def _collated(self, view: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not view:
            return self.collator(rows)
        batch = self.augmented([row | {"epoch": view} for row in rows])
        normalized = {"pixel_values": normalized_pixels(batch)} if "pixel_values" in batch else {}
        return {name: value for name, value in batch.items() if name not in NORMALIZATION} | normalized

    def _with_texts(self, batch: dict[str, torch.Tensor], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Puts texts behind those of a batch, of which none belongs to an image any more."""
        if not texts or "input_ids" not in batch:
            return batch
        tokenizer = self.collator.tokenizer
        more = tokenized(tokenizer, texts)
        longest = max(one["input_ids"].shape[1] for one in (batch, more))
        joined = {
            name: torch.cat([F.pad(one[name], (0, longest - one[name].shape[1]), value=fill) for one in (batch, more)])
            for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0))
        }
        return {"pixel_values": batch["pixel_values"], **joined}


def calibration_rows(
    source: PairSource, *, image_column: str, caption_column: str | None, **reading: Any
) -> Dataset | IterableDataset:
    """
    Loads pairs to calibrate on, or images alone where a source has nothing else, such as a folder of images without
    captions. Then there is no column of captions, texts are made up, and a warning says so.

    Args:
        source: What `load_pairs` reads.
        image_column: Column of the images.
        caption_column: Column of the captions; `None` if they are not to be read.
        reading: Further arguments of `load_pairs`.

    Raises:
        ValueError: If a column is missing, and the source has others that may hold texts.
    """
    columns = {"image_column": image_column, **reading}
    if "split" in columns:  # a slice was meant for the training data
        columns["split"] = split_names(columns["split"])[0]
    if caption_column is None:
        return load_pairs(source, caption_columns=[], **columns)
    rows = pairs_or_images(source, caption_column=caption_column, **columns)
    if caption_column not in rows.column_names:
        logger.warning("The calibration data has images alone; texts of random tokens take the place of captions.")
    return rows


def sampled_pairs(
    source: PairSource,
    processor: Any,
    pairs: int,
    *,
    image_column: str = "image",
    caption_column: str | None = "caption",
    once: bool = False,
) -> CalibrationPairs:
    """
    Samples calibration pairs from any source.

    Args:
        source: What `load_pairs` reads.
        processor: The model's `CLIPProcessor`.
        pairs: Number of pairs to take.
        image_column: Column of the images.
        caption_column: Column of the captions; `None` if there are none.
        once: Whether each pair is taken once, though there are too few. By default, there are several views of each.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if isinstance(source, (str, os.PathLike)):
        rows = calibration_rows(source, image_column=image_column, caption_column=caption_column)
        columns["caption_column"] = caption_column if caption_column in rows.column_names else None
        columns["image_column"] = "image"  # to which `load_pairs` renames it
    else:
        rows = given_pairs(source)
    caption = columns["caption_column"]
    drawing = PairCollator(processor.tokenizer, processor.image_processor, [caption] if caption else [])
    more = () if once else further_texts(rows, drawing, MORE_TEXTS * pairs, seed=0)
    return CalibrationPairs(rows, processor, pairs, **columns, augmentation=None if once else CROPS, more_texts=more)
