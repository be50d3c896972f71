"""Makes batches of all views of undecoded rows, in the order of the rows."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.keys import content_key
from clipmap_hf.data.loader import start_worker


__all__ = ["ViewCollator", "rows_of_rank", "view_batches"]

logger = logging.getLogger(__name__)


def rows_of_rank(
    rows: datasets.Dataset | datasets.IterableDataset, rank: int, world_size: int
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Returns the part of the rows that a process handles. All parts in order are all rows.

    Args:
        rows: The rows of all processes.
        rank: Index of the process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer rows, or shards of a stream, than processes.
    """
    stored = isinstance(rows, datasets.Dataset)
    parts, name = (len(rows), "rows") if stored else (rows.num_shards, "shards")
    if parts < world_size:
        raise ValueError(
            f"The data has {parts} {name}, fewer than the {world_size} processes that share them. Use fewer processes"
            f"{'' if stored else ', or split the data into more files'}."
        )
    return rows.shard(num_shards=world_size, index=rank, contiguous=True)


def view_batches(
    rows: datasets.Dataset | datasets.IterableDataset,
    collator: PairCollator,
    views: int,
    *,
    batch_size: int,
    block_size: int,
    skip: int = 0,
    num_workers: int = 0,
) -> Iterable[dict[str, Any]]:
    """
    Makes the batches of `ViewCollator` for all rows. They come in the order of the rows, with any number of workers.

    Args:
        rows: The pairs, with undecoded images.
        collator: Makes the views and captions, as in training.
        views: Number of views per row.
        batch_size: Views per batch. Every batch has at least one row.
        block_size: Rows per block. No batch crosses the end of a block.
        skip: Number of rows to skip.
        num_workers: Worker processes that decode and augment.
    """
    return DataLoader(
        _GivenRows(),
        batch_sampler=_split_rows(_skip_rows(rows, skip), max(batch_size // views, 1), block_size),
        collate_fn=ViewCollator(replace(collator, teacher_cache=None), views),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the default would change the global generator
    )


@dataclass(frozen=True)
class ViewCollator:
    """
    Turns rows into a batch of all their views, with the views of a row side by side. Its entries are those of
    `PairCollator.batch`; `image_keys` of the rows and `text_keys` of the captions; the number of `rows`; and the
    number of `bad_rows` by reason.

    Args:
        collator: Makes the views and captions.
        views: Number of views per row.
    """

    collator: PairCollator
    views: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        examples, bad = [], Counter()
        for row in rows:
            try:
                content, image = self.collator.decoded(row)
                examples += [self.collator.view(row, content, image, view) for view in range(self.views)]
            except BadRowError as error:
                bad[error.reason] += 1
                logger.warning("Row left out: %s", error)
        batch = {
            "rows": len(rows),
            "bad_rows": dict(bad),
            "image_keys": [example.key for example in examples[:: self.views]],
            "text_keys": [content_key(text) for example in examples for text in example.texts],
        }
        return batch | self.collator.batch(examples) if examples else batch


class _GivenRows(Dataset):
    """A data set whose indices are the rows themselves, so that rows are read in order and decoded in parallel."""

    def __getitem__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


def _split_rows(rows: Iterable[dict[str, Any]], batch_size: int, block_size: int) -> Iterator[list[dict[str, Any]]]:
    """Splits rows into lists of `batch_size`. The last list of a block is shorter if the block ends before."""
    rows = iter(rows)
    for first in cycle(range(0, block_size, batch_size)):
        batch = list(islice(rows, min(batch_size, block_size - first)))
        if not batch:
            return
        yield batch


def _skip_rows(rows: datasets.Dataset | datasets.IterableDataset, number: int) -> Iterable[dict[str, Any]]:
    if isinstance(rows, datasets.Dataset) and number == len(rows):  # `Dataset.skip` fails if no row is left
        return []
    return rows.skip(number)
