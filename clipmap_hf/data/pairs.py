"""Loads image–text pairs from a Hub id, an image folder, parquet files or webdataset tars, with undecoded images."""

import glob
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Image, IterableDataset, load_dataset

from clipmap_hf.data.tar_shards import tar_pairs


__all__ = ["load_pairs", "undecoded"]

_TARS = (".tar", ".tar.gz", ".tgz")
_FILES = (".parquet", *_TARS)


def load_pairs(
    source: str,
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
            files or webdataset tars (`.tar`, `.tar.gz`, `.tgz`), or the id of a data set on the Hub.
        split: Split to read. Local files have only `train`, unless an image folder holds other splits.
        image_column: Column of the images; in tars, the extension of the image files.
        caption_columns: Columns of the captions, each a string or a list of strings; in tars, the extensions of the
            text files.
        streaming: Whether to return an `IterableDataset` that reads the source in order, with the same rows, instead
            of a `Dataset`.

    Raises:
        ValueError: If nothing is found at `source`, or a column is missing.
    """
    path = Path(source)
    if path.is_dir():
        for suffix in _FILES:
            if any(path.glob(f"*{suffix}")):
                raise ValueError(f"{source!r} is a folder of {suffix} files; name them by a glob: '{path}/*{suffix}'.")
        pairs = load_dataset("imagefolder", data_dir=str(path), split=split, streaming=streaming)
    elif source.endswith(_FILES):
        files = _matching_files(source)
        if split != "train":
            raise ValueError(f"split={split!r}: plain files such as {source!r} have only the split 'train'.")
        if source.endswith(_TARS):
            return tar_pairs(files, image_column, caption_columns, streaming)
        pairs = load_dataset("parquet", data_files=files, split=split, streaming=streaming)
    elif path.exists():
        raise ValueError(f"{source!r} is neither a folder nor one of {list(_FILES)} files.")
    else:
        pairs = load_dataset(source, split=split, streaming=streaming)
    return undecoded(pairs, source, image_column, caption_columns)


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
