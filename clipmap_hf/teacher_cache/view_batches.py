"""All views of undecoded rows, in the order of the rows, as batches."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from clipmap_hf.data.collate import PairCollator, content_key, decoded
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.loader import start_worker


__all__ = ["ViewCollator", "rows_of_rank", "view_batches"]

logger = logging.getLogger(__name__)


def rows_of_rank(
    rows: datasets.Dataset | datasets.IterableDataset, rank: int, world_size: int
) -> datasets.Dataset | datasets.IterableDataset:
    """
    The part of a process, all parts in order being the whole.

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
    The batches of `ViewCollator` of all rows in their order, whatever the number of workers.

    Args:
        rows: The pairs, images undecoded.
        collator: Makes the views and captions, as in training.
        views: Number of views per row.
        batch_size: Views per batch; there is at least one row in each.
        block_size: A batch ends after each `block_size` rows.
        skip: Rows to begin after.
        num_workers: Worker processes that decode and augment.
    """
    return DataLoader(
        _GivenRows(),
        batch_sampler=_batches(_without_first(rows, skip), max(batch_size // views, 1), block_size),
        collate_fn=ViewCollator(replace(collator, teacher_cache=None), views),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # or the loader would draw from, and change, the global one
    )


@dataclass(frozen=True)
class ViewCollator:
    """
    Turns rows into what `PairCollator.batch` makes of all their views, those of a row side by side; `image_keys` of
    the rows and `text_keys` of the captions; and the number of `rows` and `bad_rows`, the latter by reason.

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
                content, image = decoded(row)
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
    """Lets the sampler hand whole rows to the workers: they are read once, in order, and decoded in parallel."""

    def __getitem__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


def _batches(rows: Iterable[dict[str, Any]], batch_size: int, block_size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of `batch_size`, the last one of every block as long as the block has room."""
    rows = iter(rows)
    for first in cycle(range(0, block_size, batch_size)):
        batch = list(islice(rows, min(batch_size, block_size - first)))
        if not batch:
            return
        yield batch


def _without_first(rows: datasets.Dataset | datasets.IterableDataset, number: int) -> Iterable[dict[str, Any]]:
    if isinstance(rows, datasets.Dataset) and number == len(rows):  # `skip` cannot leave nothing
        return []
    return rows.skip(number)
