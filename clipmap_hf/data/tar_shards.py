"""Reads pairs from webdataset tars, from front to back; of a broken tar, only the rest is lost."""

import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value

from clipmap_hf.data.columns import ERROR_COLUMN, MissingColumnError


__all__ = ["IMAGE_EXTENSIONS", "StrictHeader", "member_key", "shard_rows", "tar_pairs"]

logger = logging.getLogger(__name__)

_ROWS_SEEN_FOR_COLUMNS = 100
IMAGE_EXTENSIONS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "jfif", "tif", "tiff", "avif")
_BLOCK = 1 << 16  # bytes per read: smaller blocks need more calls, larger blocks more copying of their rest
# Errors of broken tars: a broken header of gzip raises a TypeError; overwritten numbers raise a ValueError or an
# OverflowError.
_BROKEN = (tarfile.TarError, EOFError, OSError, TypeError, ValueError, OverflowError)


def member_key(name: str) -> tuple[str, str]:
    """
    Splits the name of a file in a tar into the key of its row and the name of its column. For `a/000.seg.PNG`, these
    are `a/000` and `seg.png`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", suffix.lower()


def shard_rows(
    files: Sequence[tuple[str, int, int]], image_column: str, caption_columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """
    Yields the rows of several tars: `image` (undecoded), the captions as text, and `ERROR_COLUMN`. Entries that a row
    lacks are `None`. If the rest of a tar cannot be read, or a tar has no rows, a row with the reason in that column
    stands for it.

    Args:
        files: Path, size and modification time of every tar. Only the path is used here. With the others, `datasets`
            notices that a file has changed since it was cached.
        image_column: Extension of the images. `image` stands for all that images have; a row's first is taken.
        caption_columns: Extensions of the captions.
    """
    images, captions = _image_extensions(image_column), {column.lower() for column in caption_columns}
    for path, _, _ in files:
        error = "empty shard"
        try:
            for key, group in _groups(path, images, captions):
                error = None
                yield _row(f"{path}::{key}", group, image_column, caption_columns, None)
        except _BROKEN as reason:
            error = "unreadable shard" if isinstance(reason, OSError) else "truncated shard"
            logger.warning("%s: %s: %s; the rest of this file is left out.", path, error, reason)
        if error is not None:
            yield _row(path, {}, image_column, caption_columns, error)


def tar_pairs(
    files: Sequence[str], image_column: str, caption_columns: Sequence[str], streaming: bool
) -> Dataset | IterableDataset:
    """
    Makes a data set of the rows of `shard_rows`.

    Args:
        files: Paths of the tars.
        image_column: Extension of the images, as in `shard_rows`.
        caption_columns: Extensions of the captions.
        streaming: Whether to read the tars in every pass, with a shard per file, instead of copying them to the cache.

    Raises:
        ValueError: If no tar holds a row, or a column is missing in all of the first rows.
    """
    _check_columns(files, [image_column, *caption_columns])
    captions = {column: Value("string") for column in caption_columns}
    features = Features({"image": Image(decode=False), **captions, ERROR_COLUMN: Value("string")})
    stats = [(path, os.stat(path)) for path in files]
    keywords = {
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        "image_column": image_column,
        "caption_columns": tuple(caption_columns),  # a list would be split over the shards
    }
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(shard_rows, features=features, gen_kwargs=keywords)


def _check_columns(files: Sequence[str], columns: Sequence[str]) -> None:
    """Raises a `ValueError` if a column is missing in all of the first rows of the first file that has rows."""
    for path in files:
        found = set()
        try:
            groups = groupby(_members(path), key=lambda member: member_key(member[0])[0])
            for _, members in islice(groups, _ROWS_SEEN_FOR_COLUMNS):
                found |= {member_key(name)[1] for name, _ in members}
        except _BROKEN as reason:
            logger.debug("%s: %s", path, reason)  # shard_rows will log a warning
        if found:
            image, *captions = columns
            missing = [] if found & set(_image_extensions(image)) else [image]
            missing += [column for column in captions if column.lower() not in found]
            if missing:
                raise MissingColumnError(repr(path), missing, sorted(found))
            return
    raise ValueError(
        f"None of the {len(files)} tars holds a file such as 000.{columns[0]}; the first is {files[0]!r}."
    )


def _image_extensions(image_column: str) -> tuple[str, ...]:
    column = image_column.lower()
    return IMAGE_EXTENSIONS if column == "image" else (column,)


def _caption(content: bytes) -> str:
    """Several lines are several captions, as a list in JSON: a column has one type."""
    text = content.decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return json.dumps(lines) if len(lines) > 1 else text


def _row(
    path: str, group: dict[str, bytes], image_column: str, caption_columns: Sequence[str], error: str | None
) -> dict[str, Any]:
    extensions = _image_extensions(image_column)
    image = next((content for column, content in group.items() if column in extensions), None)
    texts = {column: group.get(column.lower()) for column in caption_columns}
    captions = {column: None if text is None else _caption(text) for column, text in texts.items()}
    return {
        "image": None if image is None else {"bytes": image, "path": path},
        **captions,
        ERROR_COLUMN: error,
    }


def _groups(path: str, images: Sequence[str], captions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """
    Yields the key, an image and the captions of each row. Complete rows come at once: what follows may be broken.
    """
    key, group, pending = None, {}, False
    for name, read in _members(path):
        stem, column = member_key(name)
        if stem != key or column in group:  # a repeated column begins a new row
            if pending:
                yield key, group
            key, group, pending = stem, {}, True
        if column in captions or (column in images and group.keys() <= captions):
            group[column] = read()
            if len(group) == len(captions) + 1:
                yield key, group
                pending = False
    if pending:
        yield key, group


def _members(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the name and a function that reads the content, for every file of a tar that has a key and a column."""
    with tarfile.open(path, "r|*", tarinfo=StrictHeader, bufsize=_BLOCK) as tar:
        for member in iter(tar.next, None):
            tar.members.clear()  # otherwise, all headers would stay in memory
            if member.isreg() and all(member_key(member.name)):
                yield member.name, tar.extractfile(member).read


class StrictHeader(tarfile.TarInfo):
    """Raises an error for a truncated or overwritten header, which `tarfile` would take for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # zeros, which end every complete tar
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
