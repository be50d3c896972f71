"""Image–text pairs from a Hub id, an image folder, parquet files or webdataset tars, images left undecoded."""

import glob
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from torch.utils.data import Dataset as TorchDataset


__all__ = ["PairDataset", "load_pairs"]

_FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_pairs(
    source: str, *, split: str = "train", image_column: str = "image", caption_columns: Sequence[str] = ("caption",)
) -> Dataset:
    """
    Loads pairs as a `datasets.Dataset` with the column `image` (undecoded bytes or path) and the caption columns.

    Args:
        source: A folder of images (with captions in `metadata.jsonl` or `metadata.csv`), a path or glob of `.parquet`
            files or webdataset `.tar`s, or the id of a data set on the Hub.
        split: Split to read; local files have only `train` unless an image folder holds others.
        image_column: Column of the images.
        caption_columns: Columns of the captions, each a string or a list of strings.

    Raises:
        ValueError: If nothing is found at `source`, or a column is missing.
    """
    path = Path(source)
    if path.is_dir():
        for suffix in _FILE_BUILDERS:
            if any(path.glob(f"*{suffix}")):
                raise ValueError(f"{source!r} is a folder of {suffix} files; name them by a glob: '{path}/*{suffix}'.")
        dataset = load_dataset("imagefolder", data_dir=str(path), split=split)
    elif path.suffix in _FILE_BUILDERS:
        files = [source] if path.exists() else sorted(glob.glob(source, recursive=True))
        if not files:
            raise ValueError(f"No file matches {source!r}.")
        if split != "train":
            raise ValueError(f"split={split!r}: plain files such as {source!r} have only the split 'train'.")
        dataset = load_dataset(_FILE_BUILDERS[path.suffix], data_files=files, split=split)
    elif path.exists():
        raise ValueError(f"{source!r} is neither a folder nor one of {sorted(_FILE_BUILDERS)} files.")
    else:
        dataset = load_dataset(source, split=split)
    missing = [column for column in (image_column, *caption_columns) if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{source!r} has no column {missing}; it has {dataset.column_names}.")
    dataset = dataset.select_columns([image_column, *caption_columns])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    return dataset.cast_column("image", Image(decode=False))


class PairDataset(TorchDataset):
    """
    Pairs that carry a `key`, `(epoch, index)`, from which the collator seeds everything random about the example.

    Args:
        pairs: The result of `load_pairs`.
    """

    def __init__(self, pairs: Dataset):
        self.pairs = pairs
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the next epoch's augmentations."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        return {**self.pairs[index], "key": (self.epoch, index)}
