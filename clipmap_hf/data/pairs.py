"""Loads image–text pairs, with undecoded images, from files, the Hub, or what a Python program holds."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
)

from clipmap_hf.data.tar_shards import tar_pairs


__all__ = ["Datasets", "PairSource", "given_pairs", "holds_pairs", "load_pairs", "undecoded"]

Datasets = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
PairSource = str | os.PathLike | Datasets | Sequence[tuple[Any, Any]]

_TARS = (".tar", ".tar.gz", ".tgz")
_FILES = (".parquet", *_TARS)


def load_pairs(
    source: PairSource,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_columns: Sequence[str] = ("caption",),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Loads pairs with the column `image` (undecoded bytes or path) and the caption columns. Pairs from tars also have
    the column `error`: the reason why a row could not be read, otherwise `None`.

    Args:
        source: A folder of images (with captions in `metadata.jsonl` or `metadata.csv`), a path or glob of `.parquet`
            files or webdataset tars (`.tar`, `.tar.gz`, `.tgz`), the id of a data set on the Hub, or whatever
            `given_pairs` takes.
        split: Split to read, or a slice of it such as `train[:90%]`. Local files have only `train`, unless an image
            folder holds other splits.
        image_column: Column of the images; in tars, the extension of the image files.
        caption_columns: Columns of the captions, each a string or a list of strings; in tars, the extensions of the
            text files.
        streaming: Whether to return an `IterableDataset` that reads the source in order, with the same rows, instead
            of a `Dataset`.

    Raises:
        TypeError: If `source` is none of these.
        ValueError: If nothing is found at `source`, or a column is missing.
    """
    if not isinstance(source, (str, os.PathLike)):
        return undecoded(given_pairs(source), "The data", image_column, caption_columns)
    source = os.fspath(source)
    path = Path(source)
    if path.is_dir():
        for suffix in _FILES:
            if any(path.glob(f"*{suffix}")):
                raise ValueError(f"{source!r} is a folder of {suffix} files; name them by a glob: '{path}/*{suffix}'.")
        pairs = load_dataset("imagefolder", data_dir=str(path), split=split, streaming=streaming)
    elif source.endswith(_FILES):
        files = _matching_files(source)
        if not split.startswith("train"):
            raise ValueError(f"split={split!r}: plain files such as {source!r} have only the split 'train'.")
        if split != "train" and (streaming or source.endswith(_TARS)):
            raise ValueError(f"split={split!r}: tars and streams are read as a whole; take split='train'.")
        if source.endswith(_TARS):
            return tar_pairs(files, image_column, caption_columns, streaming)
        pairs = load_dataset("parquet", data_files=files, split=split, streaming=streaming)
    elif path.exists():
        raise ValueError(f"{source!r} is neither a folder nor one of {list(_FILES)} files.")
    else:
        pairs = load_dataset(source, split=split, streaming=streaming)
    return undecoded(pairs, source, image_column, caption_columns)


def holds_pairs(data: Any) -> bool:
    """Tells whether data is a source of pairs, as `load_pairs` takes them; otherwise it may be made of batches."""
    if isinstance(data, (list, tuple)):
        return bool(data) and not isinstance(data[0], Mapping)
    return isinstance(data, (str, os.PathLike, Mapping, Datasets))


def given_pairs(source: Any) -> Dataset | IterableDataset:
    """
    Takes pairs that a program holds already.

    Args:
        source: A `datasets.Dataset` or `IterableDataset`; a dict of them with a single split; or a list of
            `(image, text)`, the image a PIL image, an array, the bytes of a file or its path. Pairs of a list have
            the columns `image` and `caption`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a dict has several splits, or the list is empty.
    """
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        if len(source) != 1:
            raise ValueError(f"The data has the splits {sorted(source)}; give one of them, such as data['train'].")
        return next(iter(source.values()))
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 2 for row in source):
        if not source:
            raise ValueError("The data is an empty list; give at least one pair (image, text).")
        images, texts = zip(*source, strict=True)
        images = [os.fspath(image) if isinstance(image, os.PathLike) else image for image in images]
        return Dataset.from_dict({"image": images, "caption": texts}, features=_features(texts))
    raise TypeError(
        f"Data of the type {type(source).__name__} cannot be read. Give a path, a Hub id, a datasets.Dataset or "
        "IterableDataset, or a list of (image, text)."
    )


def _features(texts: Sequence[Any]) -> Features:
    text = Value("string") if all(isinstance(caption, str) for caption in texts) else List(Value("string"))
    return Features({"image": Image(), "caption": text})


def _matching_files(source: str) -> list[str]:
    files = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    if not files:
        raise ValueError(f"No file matches {source!r}.")
    return files


def undecoded(
    pairs: Dataset | IterableDataset, source: str, image_column: str, caption_columns: Sequence[str]
) -> Dataset | IterableDataset:
    """
    Selects the columns of pairs that will be read. The image column is renamed to `image` and left undecoded.

    Args:
        pairs: The pairs.
        source: Name of the pairs in error messages.
        image_column: Column of the images.
        caption_columns: Other columns to keep.

    Raises:
        ValueError: If a column is missing.
    """
    if pairs.features is None:
        raise ValueError(f"The columns of {source!r} are unknown until it is read; load it with streaming=False.")
    missing = [column for column in (image_column, *caption_columns) if column not in pairs.column_names]
    if missing:
        raise ValueError(f"{source!r} has no column {missing}; it has {pairs.column_names}.")
    pairs = pairs.select_columns([image_column, *caption_columns])
    if image_column != "image":
        pairs = pairs.rename_column(image_column, "image")
    return pairs.cast_column("image", Image(decode=False))
