"""Builds a teacher cache block by block; each block is complete or absent, so that a build can be resumed."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from clipmap_hf.data.collate import PairCollator, normalized_pixels
from clipmap_hf.data.tally import RowTally
from clipmap_hf.files.atomic import read_json, write_atomically, write_json
from clipmap_hf.models.features import encode_images, encode_texts, evaluating
from clipmap_hf.teacher_cache.files import (
    INDEX,
    MANIFEST,
    SUMMARY,
    block_file,
    cache_progress,
    done_file,
    load_arrays,
    read_counts,
    start_cache,
    written_blocks,
)
from clipmap_hf.teacher_cache.view_batches import rows_of_rank, view_batches


__all__ = ["build_teacher_cache", "finish_teacher_cache"]

logger = logging.getLogger(__name__)


def build_teacher_cache(
    folder: str | Path,
    teachers: Sequence[nn.Module],
    rows: datasets.Dataset | datasets.IterableDataset,
    collator: PairCollator,
    manifest: Mapping[str, Any],
    *,
    batch_size: int = 256,
    block_size: int = 4096,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_bad_fraction: float = 0.01,
) -> None:
    """
    Writes this process's blocks of a cache. After an interruption, it writes the blocks that are still missing. When
    all processes are done, one of them must call `finish_teacher_cache`.

    Args:
        folder: Folder of the cache.
        teachers: CLIP models, all on the device on which they run.
        rows: The pairs of all processes, with undecoded images.
        collator: Makes the views and captions, as in training.
        manifest: The result of `cache_manifest`, which has the number of views.
        batch_size: Views, or captions, per forward pass.
        block_size: Rows per block. After an interruption, at most this number of rows is computed again.
        num_workers: Worker processes that decode and augment.
        rank: Index of this process.
        world_size: Number of processes.
        max_bad_fraction: Largest number of unusable rows, as a fraction of the rows read or of 1000 rows, whichever
            is more.

    Raises:
        OSError: If the folder cannot be written, or the disk is full.
        ValueError: If the folder holds another cache, there are too few rows or shards, or too many rows are unusable.
    """
    folder = Path(folder)
    views = manifest["views"]
    rows = rows_of_rank(rows, rank, world_size)
    start_cache(folder, {"manifest": manifest, "block_size": block_size, "world_size": world_size}, rank)
    done, marker = written_blocks(folder, rank), done_file(folder, rank)
    if marker.is_file() and len(done) >= read_json(marker)["blocks"]:
        return
    tally = RowTally(max_bad_fraction)
    for path in done:
        tally.add(**read_counts(path))
    batches = view_batches(
        rows, collator, views, batch_size=batch_size, block_size=block_size, skip=tally.rows, num_workers=num_workers
    )
    blocks = len(done)
    with ExitStack() as stack, torch.no_grad():
        for teacher in teachers:
            stack.enter_context(evaluating(teacher))
        for block in _fill_blocks(tally.counting(batches), lambda: _Block(teachers, views), block_size):
            write_atomically(block_file(folder, rank, blocks), block.content())
            blocks += 1
            logger.info("Teacher cache: block %d of process %d, %d rows so far", blocks, rank, tally.rows)
    if tally.bad_rows:
        logger.warning("Teacher cache: of %d rows, %s were left out", tally.rows, tally.reasons())
    write_json(marker, {"blocks": blocks, "rows": tally.rows, "bad_rows": tally.bad_rows})


def finish_teacher_cache(folder: str | Path) -> None:
    """
    Completes a cache: writes the index over the blocks of all processes, unless it exists already.

    Args:
        folder: Folder of the cache.

    Raises:
        OSError: If the folder cannot be written, or the disk is full.
        ValueError: If a process is not done, a block is damaged, or no row is usable.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in (INDEX, SUMMARY)):
        return
    world_size = read_json(folder / MANIFEST)["world_size"]
    if not all(done_file(folder, rank).is_file() for rank in range(world_size)):
        raise ValueError(f"The teacher cache in '{folder}' cannot be finished: {cache_progress(folder)}.")
    counts = [read_json(done_file(folder, rank)) for rank in range(world_size)]
    paths = [
        block_file(folder, rank, number) for rank, count in enumerate(counts) for number in range(count["blocks"])
    ]
    arrays = [load_arrays(path) for path in paths]
    filled = [block for block in arrays if len(block["image_keys"])]
    bad_rows = dict(sum((Counter(count["bad_rows"]) for count in counts), Counter()))
    if not filled:
        raise ValueError(f"The teacher cache in '{folder}' is empty: none of its rows is usable ({bad_rows}).")
    teachers = sum(name.startswith("images.") for name in filled[0])
    index = {kind: _sort_keys([block[f"{kind}_keys"].numpy() for block in arrays]) for kind in ("image", "text")}
    tensors = {
        f"{kind}_{name}": torch.from_numpy(array) for kind, columns in index.items() for name, array in columns.items()
    }
    for leftover in folder.glob(".*.tmp"):  # left by killed processes
        leftover.unlink()
    write_atomically(folder / INDEX, save(tensors))
    summary = {
        "rows": sum(count["rows"] for count in counts),
        "bad_rows": bad_rows,
        "images": len(index["image"]["keys"]),
        "texts": len(index["text"]["keys"]),
        "dims": [filled[0][f"images.{number}"].shape[-1] for number in range(teachers)],
        "blocks": [path.name for path in paths],
        "bytes": {path.name: path.stat().st_size for path in [*paths, folder / INDEX]},
    }
    write_json(folder / SUMMARY, summary)


class _Block:
    """The embeddings of up to `block_size` rows. An image or caption that occurs again is not embedded again."""

    def __init__(self, teachers: Sequence[nn.Module], views: int):
        self.teachers, self.views, self.device = teachers, views, next(teachers[0].parameters()).device
        self.rows, self.bad_rows = 0, Counter()
        self.keys = {"image": {}, "text": {}}  # dicts for their order
        self.embeds = {kind: [[] for _ in teachers] for kind in self.keys}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Embeds the new images and captions of a batch from `ViewCollator`."""
        self.rows += batch["rows"]
        self.bad_rows.update(batch["bad_rows"])
        images, texts = (self._add_keys(kind, batch[f"{kind}_keys"]) for kind in ("image", "text"))
        tensors = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        if images:
            views = tensors["pixel_values"].unflatten(0, (-1, self.views))[images]
            pixels = normalized_pixels(tensors | {"pixel_values": views.flatten(0, 1)})
            for teacher, parts in zip(self.teachers, self.embeds["image"], strict=True):
                parts.append(encode_images(teacher, pixels).half().cpu().unflatten(0, (-1, self.views)))
        if texts:
            tokens = tensors["input_ids"][texts], tensors["attention_mask"][texts]
            for teacher, parts in zip(self.teachers, self.embeds["text"], strict=True):
                parts.append(encode_texts(teacher, *tokens).half().cpu())

    def content(self) -> bytes:
        """Returns the block as the content of a safetensors file."""
        arrays = {}
        for kind, keys in self.keys.items():
            arrays[f"{kind}_keys"] = torch.from_numpy(np.array(list(keys), dtype=np.uint64))
            for number, parts in enumerate(self.embeds[kind]):
                arrays[f"{kind}s.{number}"] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float16)
        counts = {"rows": self.rows, "bad_rows": self.bad_rows}
        return save(arrays, metadata={"counts": json.dumps(counts, sort_keys=True)})

    def _add_keys(self, kind: str, keys: Sequence[int]) -> list[int]:
        """Adds the keys that the block does not have yet, and returns their positions in `keys`."""
        known, positions = self.keys[kind], []
        for position, key in enumerate(keys):
            if key not in known:
                known[key] = None
                positions.append(position)
        return positions


def _fill_blocks(batches: Iterable[dict[str, Any]], new_block: Callable[[], _Block], size: int) -> Iterator[_Block]:
    """Yields blocks of `size` rows, and a last block with the rows that are left."""
    block = new_block()
    for batch in batches:
        block.add(batch)
        if block.rows == size:
            yield block
            block = new_block()
    if block.rows:
        yield block


def _sort_keys(keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Sorts the keys of all blocks. Returns them with the number of the block and the row in it of each key."""
    distinct, first = np.unique(np.concatenate(keys), return_index=True)  # the first of equal keys
    starts = np.cumsum([0, *map(len, keys)])
    blocks = np.searchsorted(starts, first, side="right") - 1
    return {"keys": distinct, "blocks": blocks.astype(np.int32), "rows": (first - starts[blocks]).astype(np.int32)}
