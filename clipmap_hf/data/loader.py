"""The order of training pairs: endless steps, each a list of chunks, which stay the same when a run is resumed."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler


__all__ = ["BatchPlan", "PairDataset", "PairStream", "start_worker"]


@dataclass(frozen=True)
class BatchPlan:
    """
    How the pairs of an optimizer step are split over processes and chunks.

    Args:
        batch_size: Pairs per step, of all processes together.
        micro_batch_size: Pairs per chunk. By default, all pairs of a process in a step are one chunk.
        seed: Seed of the order.
        num_workers: Worker processes that collate.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If the processes cannot have equally many pairs, or the chunks of a process cannot.
    """

    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} counts the pairs of all processes and must be a multiple of the number "
                f"of processes, {self.world_size}."
            )
        if self.micro_batch_size and self.local_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must divide the {self.local_size} pairs that each process "
                "has in a step."
            )

    @property
    def local_size(self) -> int:
        """Pairs per step of one process."""
        return self.batch_size // self.world_size

    @property
    def chunk_size(self) -> int:
        """Pairs per chunk."""
        return self.micro_batch_size or self.local_size


class PairDataset(Dataset):
    """
    Pairs with random access. Every epoch has its own order. Pairs at its end that do not fill a batch are left out.

    Args:
        pairs: The result of `load_pairs`.
        rounds: How often an epoch has each pair, every time in another view.

    Raises:
        ValueError: In `steps`, if there are fewer pairs than a batch needs.
    """

    def __init__(self, pairs: datasets.Dataset, rounds: int = 1):
        self.pairs, self.rounds = pairs, rounds

    def __len__(self) -> int:
        return self.rounds * len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        done, row = divmod(index, len(self.pairs))
        return {**self.pairs[row], "epoch": epoch * self.rounds + done}

    def filling(self, batch_size: int) -> "PairDataset":
        """The same pairs, as often in an epoch as it takes to fill a batch."""
        return PairDataset(self.pairs, -(-batch_size // max(len(self.pairs), 1)))

    def steps(self, plan: BatchPlan, collator: Callable, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yields, for step `start` and all later steps, the list of this process's chunks."""
        if len(self) < plan.batch_size:
            raise ValueError(
                f"The data has {len(self)} pairs, fewer than batch_size={plan.batch_size}. Use more data, or a "
                "smaller batch."
            )
        sampler = _EpochSampler(len(self), plan, start)
        loader = DataLoader(self, batch_sampler=sampler, **_loading(plan, collator))
        return _group_chunks(iter(loader), plan)


class PairStream:
    """
    Pairs that are read in order, shard by shard, endlessly. Each process has its own shards. In every epoch, the
    workers of the process share these shards in a new way. Each worker reads several shards at a time and shuffles
    their rows in a buffer.

    Args:
        pairs: The result of `load_pairs` with `streaming=True`.
        shuffle_buffer: Size of the buffer of each worker, in rows.

    Raises:
        ValueError: In `steps`, if there are fewer shards than workers. While reading, if the shards of a worker have
            no rows.
    """

    def __init__(self, pairs: datasets.IterableDataset, shuffle_buffer: int = 1000):
        self.pairs, self.shuffle_buffer = pairs, shuffle_buffer

    def steps(self, plan: BatchPlan, collator: Callable, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """
        Yields, for step `start` and all later steps, the list of this process's chunks. Rows of earlier steps are read
        and dropped.
        """
        workers = max(plan.num_workers, 1)
        readers = plan.world_size * workers
        if self.pairs.num_shards < readers:
            raise ValueError(
                f"The data has {self.pairs.num_shards} shards, fewer than the {readers} that read it "
                f"({plan.world_size} processes, num_workers={plan.num_workers}). Split it into more files, or use "
                "fewer workers."
            )
        # Workers deliver one chunk each in turn, and a new loader starts with the first worker. So all workers skip
        # the same number of chunks. Chunks of an unfinished turn are read and dropped here.
        turns, rest = divmod(start * (plan.local_size // plan.chunk_size), workers)
        rows = _EndlessRows(self, plan, skip=turns * plan.chunk_size)
        loader = iter(DataLoader(rows, plan.chunk_size, **_loading(plan, collator)))
        return _group_chunks(islice(loader, rest, None), plan)


class _EpochSampler(Sampler):
    """Yields the `(epoch, index)` keys of each chunk of the plan's process, from step `start` on."""

    def __init__(self, length: int, plan: BatchPlan, start: int):
        self.length, self.plan, self.start = length, plan, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, ordered, order = self.plan, None, None
        for step in count(self.start):
            epoch, position = divmod(step, self.length // plan.batch_size)
            if epoch != ordered:
                ordered, order = epoch, _epoch_generator(plan, epoch).permutation(self.length)
            first = position * plan.batch_size + plan.rank * plan.local_size
            for chunk in range(first, first + plan.local_size, plan.chunk_size):
                yield [(epoch, index) for index in order[chunk : chunk + plan.chunk_size].tolist()]


class _EndlessRows(IterableDataset):
    """The rows of the plan's process, epoch after epoch. In a worker, `datasets` picks the worker's shards."""

    def __init__(self, stream: PairStream, plan: BatchPlan, skip: int):
        self.pairs = stream.pairs.shard(num_shards=plan.world_size, index=plan.rank, contiguous=False)
        self.shuffle_buffer, self.plan, self.skip = stream.shuffle_buffer, plan, skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._rows(), self.skip, None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            # `set_epoch` would write to memory that the workers share, but they are not in the same epoch.
            generator = _epoch_generator(self.plan, epoch)
            row = None
            for row in self.pairs.shuffle(generator=generator, buffer_size=self.shuffle_buffer):
                yield {**row, "epoch": epoch}
            if row is None:
                raise ValueError(
                    f"A worker's share of the {self.pairs.num_shards} shards has no rows in epoch {epoch}. Remove the "
                    "files without rows, or use fewer workers."
                )


def _epoch_generator(plan: BatchPlan, epoch: int) -> np.random.Generator:
    return np.random.default_rng([plan.seed, epoch])  # a list: no epoch gets the generator of another seed


def _loading(plan: BatchPlan, collator: Callable) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(plan.seed)  # the default would change the global generator
    return {
        "collate_fn": collator,
        "num_workers": plan.num_workers,
        "worker_init_fn": start_worker,
        "generator": generator,
        "pin_memory": torch.cuda.is_available(),
    }


def start_worker(worker: int) -> None:
    """
    Prepares a worker process of a `DataLoader`, as its `worker_init_fn`. The worker must end together with the process
    that reads from it:

    - Not later: if that process is killed, a worker that was started by a fork server would go on. So a thread waits
      for the process to end.
    - Not earlier: the trainer answers a SIGTERM to the process group, but first finishes its step or evaluation, which
      needs the workers. So the worker leaves the group.
    """
    if hasattr(os, "setpgid"):  # Windows has no process groups of this kind
        os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _group_chunks(chunks: Iterator[dict[str, Any]], plan: BatchPlan) -> Iterator[list[dict[str, Any]]]:
    """Yields the chunks of each step as a list."""
    try:
        while step := list(islice(chunks, plan.local_size // plan.chunk_size)):
            yield step
    except (ConnectionError, EOFError) as error:
        # The data raised this error, here or in a worker: PyTorch reports a worker's error with a text in front.
        if not plan.num_workers or str(error).startswith("Caught "):
            raise
        raise RuntimeError(
            "A DataLoader worker exited unexpectedly while it handed over a batch; was it killed for lack of memory?"
        ) from error
