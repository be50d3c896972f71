"""Loads image–text pairs, with undecoded images, from files, the Hub, or what a Python program holds."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, List, Value

from clipmap_hf.data.builders import parquet_pairs
from clipmap_hf.data.columns import ERROR_COLUMN, MissingColumnError, undecoded
from clipmap_hf.data.folders import TAR_FILES, folder_pairs, named_pairs
from clipmap_hf.data.tar_shards import IMAGE_EXTENSIONS, tar_pairs
from clipmap_hf.files.hub_ids import check_hub_id


__all__ = [
    "Datasets",
    "PairSource",
    "given_pairs",
    "holds_pairs",
    "images_alone",
    "load_pairs",
    "name_and_config",
    "pairs_or_images",
]

Datasets = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
PairSource = str | os.PathLike | Datasets | Sequence[tuple[Any, Any]] | Sequence[Any]

_FILES = (".parquet", *TAR_FILES)
_IMAGES = (str, bytes, os.PathLike, PIL.Image.Image, np.ndarray)  # in a list


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
    the column `ERROR_COLUMN`: the reason why a row could not be read, otherwise `None`.

    Args:
        source: A folder of images (with captions in `metadata.jsonl` or `metadata.csv`); a folder that holds a data
            set, such as a clone of one on the Hub or what `save_to_disk` wrote; a path or glob of `.parquet` files or
            webdataset tars (`.tar`, `.tar.gz`, `.tgz`); the id of a data set on the Hub; or whatever `given_pairs`
            takes. If a data set has several configurations, the name of one follows: `owner/name:config`.
        split: Split to read, or a slice of it such as `train[:90%]`. Files that are named have only `train`; folders
            and data sets may have others.
        image_column: Column of the images. In tars, the extension of the image files, or `image` for all that images
            have.
        caption_columns: Columns of the captions, each a string or a list of strings; in tars, the extensions of the
            text files.
        streaming: Whether to return an `IterableDataset` that reads the source in order, with the same rows, instead
            of a `Dataset`.

    Raises:
        TypeError: If `source` is none of these.
        ValueError: If nothing is found at `source`, a column is missing, or one of several configurations must be
            named.
        FileNotFoundError: If `source` is neither a path nor a data set on the Hub.
    """
    if not isinstance(source, (str, os.PathLike)):
        return undecoded(given_pairs(source), "The data", image_column, caption_columns)
    source = os.fspath(source)
    columns = {"image_column": image_column, "caption_columns": caption_columns, "streaming": streaming}
    name = source.lower()  # some systems write extensions in capitals
    if name.endswith(_FILES) and not os.path.isdir(source):
        files = _matching_files(source)
        if not split.startswith("train"):
            raise ValueError(f"split={split!r}: plain files such as {source!r} have only the split 'train'.")
        if split != "train" and (streaming or name.endswith(TAR_FILES)):
            raise ValueError(f"split={split!r}: tars and streams are read as a whole; take split='train'.")
        if name.endswith(TAR_FILES):
            return tar_pairs(files, **columns)
        pairs = parquet_pairs(files, split, **columns)
    elif os.path.isdir(source):
        pairs = folder_pairs(os.path.abspath(source), split, **columns)  # "." has no name
    elif os.path.exists(source):
        raise ValueError(f"{source!r} is neither a folder nor one of {list(_FILES)} files.")
    else:
        name, config = name_and_config(source)
        if not os.path.isdir(name):
            check_hub_id(name, "dataset")
        pairs = named_pairs(name, split, **columns, config=config)
    of_tars = ERROR_COLUMN in (pairs.column_names or ())  # their columns are selected
    return pairs if of_tars else undecoded(pairs, repr(source), image_column, caption_columns)


def pairs_or_images(
    source: PairSource, *, caption_column: str, image_column: str = "image", **reading: Any
) -> Dataset | IterableDataset:
    """
    Loads pairs, or images alone where a source has nothing else, such as a folder of images without captions. Then
    there is no column of captions.

    Args:
        source: What `load_pairs` reads.
        caption_column: Column of the captions.
        image_column: Column of the images.
        reading: Further arguments of `load_pairs`.

    Raises:
        MissingColumnError: If there are no captions, and the source has other columns that may hold texts.
    """
    try:
        return load_pairs(source, image_column=image_column, caption_columns=[caption_column], **reading)
    except MissingColumnError as error:
        if not images_alone(error.there, image_column):
            raise
    return load_pairs(source, image_column=image_column, caption_columns=[], **reading)


def name_and_config(source: str) -> tuple[str, str | None]:
    """
    Parts a folder or Hub id and the configuration that may follow it, `owner/name:config`. What exists by its whole
    name has none; nor has a path behind a drive's letter.
    """
    name, colon, config = source.rpartition(":")
    is_named = colon and name and not {"/", "\\"} & set(config) and not os.path.exists(source)
    return (name, config) if is_named else (source, None)


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
            `(image, text)` or of images, the image a PIL image, an array, the bytes of a file or its path. Pairs of a
            list have the columns `image` and `caption`, images have `image` alone.

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
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("The data is an empty list; give at least one pair (image, text), or one image.")
        if all(isinstance(row, (list, tuple)) and len(row) == 2 for row in source):
            images, texts = zip(*source, strict=True)
            return Dataset.from_dict({"image": _files(images), "caption": texts}, features=_features(texts))
        if all(isinstance(row, _IMAGES) for row in source):
            return Dataset.from_dict({"image": _files(source)}, features=Features({"image": Image()}))
    raise TypeError(
        f"Data of the type {type(source).__name__} cannot be read. Give a path, a Hub id, a datasets.Dataset or "
        "IterableDataset, a list of (image, text), or a list of images."
    )


def images_alone(columns: Sequence[str], image_column: str) -> bool:
    """Whether a source has nothing but images, and perhaps the numbers of their classes."""
    return set(columns) <= {image_column, "label", "labels", "cls", *IMAGE_EXTENSIONS}


def _features(texts: Sequence[Any]) -> Features:
    text = Value("string") if all(isinstance(caption, str) for caption in texts) else List(Value("string"))
    return Features({"image": Image(), "caption": text})


def _files(images: Sequence[Any]) -> list[Any]:
    return [os.fspath(image) if isinstance(image, os.PathLike) else image for image in images]


def _matching_files(source: str) -> list[str]:
    files = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    if not files:
        raise ValueError(f"No file matches {source!r}.")
    return files
