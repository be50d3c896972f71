"""The files of a teacher cache: their names, and functions that start, check and read them."""

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

# A cache is a folder of blocks. A block holds the embeddings of some rows: `image_keys (images,)` and, for each
# teacher, `images.0 (images, views, dim)`; `text_keys (texts,)` and, for each teacher, `texts.0 (texts, dim)`.
# The folder also holds three other files:
MANIFEST = "manifest.json"  # everything that the embeddings depend on; it is written first
INDEX = "index.safetensors"  # the sorted keys, and the block and the row of each key
SUMMARY = "summary.json"  # the contents of the cache; it is written last, so it exists only in a complete cache


def block_file(folder: Path, rank: int, number: int) -> Path:
    """Returns the path of a block of process `rank`."""
    return folder / f"rank-{rank}-block-{number:05d}.safetensors"


def done_file(folder: Path, rank: int) -> Path:
    """Returns the path of the file that a process writes after all its blocks."""
    return folder / f"rank-{rank}.json"


def cache_progress(folder: Path) -> str:
    """Describes in words how far the cache in `folder` has been built."""
    asked = read_json(folder / MANIFEST)
    blocks, ranks = (len(list(folder.glob(pattern))) for pattern in ("rank-*-block-*.safetensors", "rank-*.json"))
    return (
        f"{blocks} blocks of at most {asked['block_size']} rows are written, and {ranks} of {asked['world_size']} "
        "processes are done"
    )


def check_manifest(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """
    Checks that a cache was built with the expected settings.

    Args:
        found: Settings of the cache.
        expected: The expected settings.
        folder: Folder of the cache, for the error message.

    Raises:
        ValueError: If settings differ. The message names every difference.
    """
    different = [
        f"{name} is {cached} in the cache, {asked} is asked"
        for name, (cached, asked) in differences(found, expected).items()
    ]
    if different:
        raise ValueError(
            f"The teacher cache in '{folder}' was built for something else: {'; '.join(different)}. "
            "Use the same settings, or build another cache in another folder."
        )


def damaged_file(path: Path, what: str) -> ValueError:
    """Makes the error for a file that is missing, truncated or unreadable, as `what` says."""
    return ValueError(
        f"A file of the teacher cache, '{path}', {what}. Copy the cache again; or delete this file and build the "
        "cache with the same settings, which adds what is missing."
    )


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """
    Returns the memory-mapped tensors of a cache's file. Data is read only when it is used, and no file stays open.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged_file(path, f"cannot be read ({error})") from error


def read_counts(path: Path) -> dict[str, Any]:
    """Reads how many `rows` a block was made of, and how many `bad_rows` were left out, by reason."""
    try:
        with safe_open(path, "pt") as block:
            return json.loads(block.metadata()["counts"])
    except SafetensorError as error:
        raise damaged_file(path, f"cannot be read ({error})") from error


def start_cache(folder: Path, asked: Mapping[str, Any], rank: int = 0) -> None:
    """
    Starts a cache, or resumes it if the folder was started before with the same settings. Files that process `rank`
    left incomplete are removed.

    Args:
        folder: Folder of the cache.
        asked: The settings: `manifest`, `block_size` and `world_size`.
        rank: Index of this process.

    Raises:
        ValueError: If the folder was started with other settings.
    """
    path = folder / MANIFEST
    if not path.is_file():
        write_json(path, asked)
    for leftover in folder.glob(f".rank-{rank}-*.tmp"):
        leftover.unlink()
    found, flat = read_json(path), lambda cache: {**cache["manifest"], **cache, "manifest": None}
    check_manifest(flat(found), flat(asked), folder)


def written_blocks(folder: Path, rank: int) -> list[Path]:
    """Returns the blocks that a process has written, up to the first missing block."""
    return list(takewhile(Path.is_file, (block_file(folder, rank, number) for number in count())))
