"""The files of a teacher cache: their names, how they are written whole or not at all, and how they are read."""

import json
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from clipmap_hf.files.atomic import read_json, write_json
from clipmap_hf.files.differences import differences


__all__ = [
    "INDEX",
    "MANIFEST",
    "SUMMARY",
    "block_file",
    "cache_progress",
    "check_manifest",
    "damaged_file",
    "done_file",
    "load_arrays",
    "read_counts",
    "start_cache",
    "written_blocks",
]

# A cache is a folder of blocks, each the embeddings of some rows: `image_keys (images,)` and, for each teacher,
# `images.0 (images, views, dim)`; `text_keys (texts,)` and `texts.0 (texts, dim)`. Beside them stand
MANIFEST = "manifest.json"  # what the embeddings depend on, written first,
INDEX = "index.safetensors"  # the sorted keys, and the block and row of each,
SUMMARY = "summary.json"  # and what there is, written last: with it the cache is complete.


def block_file(folder: Path, rank: int, number: int) -> Path:
    """A block of process `rank`."""
    return folder / f"rank-{rank}-block-{number:05d}.safetensors"


def done_file(folder: Path, rank: int) -> Path:
    """The file that a process writes when it has written all its blocks."""
    return folder / f"rank-{rank}.json"


def cache_progress(folder: Path) -> str:
    """How far the cache in `folder` has been built, in words."""
    asked = read_json(folder / MANIFEST)
    blocks, ranks = (len(list(folder.glob(pattern))) for pattern in ("rank-*-block-*.safetensors", "rank-*.json"))
    return (
        f"{blocks} blocks of at most {asked['block_size']} rows are written, and {ranks} of {asked['world_size']} "
        "processes are done"
    )


def check_manifest(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """
    Compares what a cache was built for with what is asked.

    Raises:
        ValueError: If they differ; it names every difference.
    """
    different = [
        f"{name} is {cached} in the cache, {asked} is asked"
        for name, (cached, asked) in differences(found, expected).items()
    ]
    if different:
        raise ValueError(
            f"The teacher cache in '{folder}' was built for something else: {'; '.join(different)}. "
            "Ask for the same, or build another cache in another folder."
        )


def damaged_file(path: Path, what: str) -> ValueError:
    """The error for a file that is missing or truncated, or cannot be read."""
    return ValueError(
        f"A file of the teacher cache, '{path}', {what}. Copy the cache anew; or delete this file and build the cache "
        "again with the same settings, which goes on from there."
    )


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """
    The memory-mapped tensors of a file of a cache; none of them is read before it is used, and no file stays open.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged_file(path, f"cannot be read ({error})") from error


def read_counts(path: Path) -> dict[str, Any]:
    """How many `rows` made a block, and its `bad_rows`."""
    try:
        with safe_open(path, "pt") as block:
            return json.loads(block.metadata()["counts"])
    except SafetensorError as error:
        raise damaged_file(path, f"cannot be read ({error})") from error


def start_cache(folder: Path, asked: Mapping[str, Any], rank: int = 0) -> None:
    """
    Writes into `folder` what is asked: `manifest`, `block_size` and `world_size`. A folder that was started before
    must have been for the same; what process `rank` left half-written there is removed.

    Raises:
        ValueError: If it was started for something else.
    """
    path = folder / MANIFEST
    if not path.is_file():
        write_json(path, asked)
    for leftover in folder.glob(f".rank-{rank}-*.tmp"):
        leftover.unlink()
    found, flat = read_json(path), lambda cache: {**cache["manifest"], **cache, "manifest": None}
    check_manifest(flat(found), flat(asked), folder)


def written_blocks(folder: Path, rank: int) -> list[Path]:
    """The blocks of a process up to the first that is missing."""
    return list(takewhile(Path.is_file, (block_file(folder, rank, number) for number in count())))
