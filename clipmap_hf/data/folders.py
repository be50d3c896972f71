"""Reads pairs of folders and of Hub ids by what is there: images, parquet files, tars, or what `datasets` saved."""

import os
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    IterableDataset,
    ReadInstruction,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import metadata_load

from clipmap_hf.data.builders import image_folder_pairs, parquet_pairs
from clipmap_hf.data.columns import check_columns
from clipmap_hf.data.tar_shards import tar_pairs


__all__ = ["TAR_FILES", "folder_pairs", "named_pairs"]

TAR_FILES = (".tar", ".tar.gz", ".tgz")
_SAVED = ("state.json", "dataset_dict.json")  # which `save_to_disk` writes
_TABLES = (".parquet", ".arrow", *TAR_FILES)


def folder_pairs(
    folder: str, split: str, *, image_column: str, caption_columns: Sequence[str], streaming: bool
) -> Dataset | IterableDataset:
    """
    Reads the pairs of a folder, with all of their columns or those that are needed.

    Args:
        folder: A folder of images, of shards, of a data set's clone, or what `save_to_disk` wrote.
        split: Split, or a slice of it.
        image_column: Column of the images.
        caption_columns: Other columns to read.
        streaming: Whether to read the folder in every pass.

    Raises:
        ValueError: If there is no such split or column, or one of several configurations must be named.
    """
    path = Path(folder)
    if any((path / name).exists() for name in _SAVED):
        return _saved_pairs(path, split, streaming)
    if _says_its_files(path) or any(_is_table(file) for file in path.rglob("*")):
        columns = {"image_column": image_column, "caption_columns": caption_columns, "streaming": streaming}
        return named_pairs(folder, split, **columns)
    files = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    return image_folder_pairs(folder, files, split, streaming)


def _says_its_files(folder: Path) -> bool:
    card = folder / "README.md"
    return card.exists() and bool((metadata_load(card) or {}).get("configs"))


def _is_table(file: Path) -> bool:
    return file.name.endswith(_TABLES) and file.name != "metadata.parquet"


def _saved_pairs(folder: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"split={split!r} of {str(folder)!r}: it has {sorted(splits)}. {error}") from error
    rows = splits[part.splitname]
    rows = rows.select(range(*slice(part.from_, part.to).indices(len(rows))))
    return rows.to_iterable_dataset() if streaming else rows


def named_pairs(
    name: str,
    split: str,
    *,
    image_column: str,
    caption_columns: Sequence[str],
    streaming: bool,
    config: str | None = None,
) -> Dataset | IterableDataset:
    """
    Reads the pairs of a data set as `load_dataset` does: of its parquet files the needed columns alone, and its tars
    by `tar_pairs` where they are local.

    Args:
        name: Folder or Hub id.
        split: Split, or a slice of it.
        image_column: Column of the images.
        caption_columns: Other columns to read.
        streaming: Whether to read the data set in every pass.
        config: Name of a configuration.

    Raises:
        ValueError: If there is no such split or column, one of several configurations must be named, or a file cannot
            be read.
    """
    builder = _builder(name, config)
    files = (builder.config.data_files or {}).get(split.partition("[")[0], [])
    columns = {"image_column": image_column, "caption_columns": caption_columns, "streaming": streaming}
    is_local = os.path.isdir(name)
    if isinstance(builder, Parquet) and files:
        if is_local:
            return parquet_pairs(files, split, **columns)
        return _loaded(name, config, split, streaming, columns=_needed(builder, files, image_column, caption_columns))
    if isinstance(builder, WebDataset) and files and is_local:
        if "[" in split:
            raise ValueError(f"split={split!r}: tars are read as a whole; leave out the slice.")
        return tar_pairs(files, **columns)
    if isinstance(builder, ImageFolder) and is_local:
        return image_folder_pairs(name, builder.config.data_files, split, streaming)
    return _loaded(name, config, split, streaming)


def _builder(name: str, config: str | None) -> DatasetBuilder:
    try:
        return load_dataset_builder(name, config)
    except ValueError as error:
        configs = get_dataset_config_names(name)
        if config in configs or (config is None and len(configs) == 1):
            raise
        raise ValueError(
            f"{name!r} has the configurations {configs}; name one of them: '{name}:{configs[0]}'."
        ) from error


def _needed(builder: Parquet, files: Sequence[str], image_column: str, caption_columns: Sequence[str]) -> list[str]:
    """The columns that are read; looks whether they are there, in the first file if nothing else says so."""
    features = builder.info.features
    if features is None:
        with fsspec.open(files[0]) as file:
            features = Features.from_arrow_schema(pq.read_schema(file))
    check_columns(features, repr(builder.repo_id or files[0]), image_column, caption_columns)
    return [image_column, *caption_columns]


def _loaded(name: str, config: str | None, split: str, streaming: bool, **kwargs) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming, **kwargs)
    except DatasetGenerationError as error:
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
