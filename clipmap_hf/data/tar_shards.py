"""Pairs from webdataset tars, read front to back; a broken tar loses its own rest, not the run."""

import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value


__all__ = ["StrictHeader", "member_key", "shard_rows", "tar_pairs"]

logger = logging.getLogger(__name__)

_ROWS_SEEN_FOR_COLUMNS = 100
_BLOCK = 1 << 16  # of a read; smaller ones cost calls, larger ones copies of what is left of a block
# A broken header of gzip is a TypeError; ValueError and OverflowError come from numbers that were overwritten.
_BROKEN = (tarfile.TarError, EOFError, OSError, TypeError, ValueError, OverflowError)


def member_key(name: str) -> tuple[str, str]:
    """The part of a member's name that its row shares, and the column: `('a/000', 'seg.png')` of `a/000.seg.PNG`."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", suffix.lower()


def shard_rows(
    files: Sequence[tuple[str, int, int]], image_column: str, caption_columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """
    The rows of tar after tar: `image` (undecoded), the captions as text, and `error`. What a row lacks is `None`. In
    place of what cannot be read, and of the rows of a tar without any, there is one row whose `error` says so.

    Args:
        files: Path, size and time of change of every tar. The path alone is read; the others make `datasets` see that
            a file is another one than that in its cache.
        image_column: Extension of the images.
        caption_columns: Extensions of the captions.
    """
    wanted = {image_column.lower(), *(column.lower() for column in caption_columns)}
    for path, _, _ in files:
        error = "empty shard"
        try:
            for key, group in _groups(path, wanted):
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
    The rows of `shard_rows` as a data set: copied to the cache, or, `streaming`, read every time, a shard per file.

    Raises:
        ValueError: If no file holds a row, or no row has one of the columns.
    """
    _check_columns(files, [image_column, *caption_columns])
    captions = {column: Value("string") for column in caption_columns}
    features = Features({"image": Image(decode=False), **captions, "error": Value("string")})
    stats = [(path, os.stat(path)) for path in files]
    keywords = {
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        "image_column": image_column,
        "caption_columns": tuple(caption_columns),  # a list would be split over the shards
    }
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(shard_rows, features=features, gen_kwargs=keywords)


def _check_columns(files: Sequence[str], columns: Sequence[str]) -> None:
    """Raises a `ValueError` if none of the first rows of the first file that has any has one of `columns`."""
    for path in files:
        found = set()
        try:
            groups = groupby(_members(path), key=lambda member: member_key(member[0])[0])
            for _, members in islice(groups, _ROWS_SEEN_FOR_COLUMNS):
                found |= {member_key(name)[1] for name, _ in members}
        except _BROKEN as reason:
            logger.debug("%s: %s", path, reason)  # shard_rows will warn of it
        if found:
            missing = [column for column in columns if column.lower() not in found]
            if missing:
                raise ValueError(f"{path!r} has no column {missing}; it has {sorted(found)}.")
            return
    raise ValueError(
        f"None of the {len(files)} tars holds a file such as 000.{columns[0]}; the first is {files[0]!r}."
    )


def _row(
    path: str, group: dict[str, bytes], image_column: str, caption_columns: Sequence[str], error: str | None
) -> dict[str, Any]:
    image = group.get(image_column.lower())
    texts = {column: group.get(column.lower()) for column in caption_columns}
    return {
        "image": None if image is None else {"bytes": image, "path": path},
        **{column: None if text is None else text.decode(errors="replace") for column, text in texts.items()},
        "error": error,
    }


def _groups(path: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every key and its wanted members, complete ones at once, for what comes next may be broken."""
    key, group, pending = None, {}, False
    for name, read in _members(path):
        stem, column = member_key(name)
        if stem != key or column in group:  # a column that comes again begins another row
            if pending:
                yield key, group
            key, group, pending = stem, {}, True
        if column in wanted:
            group[column] = read()
            if len(group) == len(wanted):
                yield key, group
                pending = False
    if pending:
        yield key, group


def _members(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of every file of a tar that has a key and a column."""
    with tarfile.open(path, "r|*", tarinfo=StrictHeader, bufsize=_BLOCK) as tar:
        for member in iter(tar.next, None):
            tar.members.clear()  # or all headers would stay in memory
            if member.isreg() and all(member_key(member.name)):
                yield member.name, tar.extractfile(member).read


class StrictHeader(tarfile.TarInfo):
    """Raises where `tarfile` would take a cut or overwritten header for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the zeros that end every whole tar
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
