"""Batches of calibration pairs: a sample of a data set, without augmentation and the same in every iteration."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import undecoded
from clipmap_hf.data.tally import RowTally
from clipmap_hf.distributed import process_count, process_index


__all__ = ["CalibrationPairs"]

_BATCH_SIZE = 64


class CalibrationPairs:
    """
    Iterates over batches of `pixel_values` and, if there are captions, `input_ids`. Each process has its own pairs.

    Args:
        rows: A data set with the column `image` and, unless images are enough, the column `caption`. From a data set
            with random access, pairs are drawn at random. From a stream, the first pairs are taken.
        processor: The model's `CLIPProcessor`.
        pairs: Number of pairs to take, of all processes together. If there are fewer, all are taken.
        max_bad_fraction: Share of the rows that may be unusable, as in `RowTally`.
        seed: Seed of the draw.

    Raises:
        ValueError: If there are no images or fewer pairs than processes. While iterating, if too many rows are
            unusable.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        processor: Any,
        pairs: int,
        max_bad_fraction: float = 0.01,
        seed: int = 0,
    ):
        others = [column for column in ("caption", "error") if column in (rows.column_names or ())]
        rows = undecoded(rows, "The calibration data", "image", others)
        if isinstance(rows, Dataset):
            rows = rows.shuffle(seed=seed).select(range(min(pairs, len(rows))))
        else:
            rows = Dataset.from_list(list(rows.take(pairs)), features=rows.features)
        if len(rows) < process_count():
            raise ValueError(
                f"The calibration data has {len(rows)} pairs, fewer than the {process_count()} processes."
            )
        self.rows = rows.shard(process_count(), process_index(), contiguous=True)
        captions = [column for column in others if column == "caption"]
        self.collator = PairCollator(processor.tokenizer, processor.image_processor, captions)
        self.max_bad_fraction = max_bad_fraction

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tally = RowTally(self.max_bad_fraction)
        for batch in DataLoader(self.rows, _BATCH_SIZE, collate_fn=self.collator):
            bad = batch.pop("bad_rows")
            tally.add(len(batch.get("pixel_values", ())) + sum(bad.values()), bad)
            if batch:
                yield batch
