"""Reads pairs of folders and of Hub ids by what is there: images, parquet files, tars, or what `datasets` saved."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
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

from clipmap_hf.data.builders import image_folder_pairs, parquet_features, parquet_pairs
from clipmap_hf.data.columns import check_columns, split_names
from clipmap_hf.data.tar_shards import tar_pairs
from clipmap_hf.data.text_sources import check_column


__all__ = ["TAR_FILES", "column_tables", "folder_pairs", "named_pairs"]

TAR_FILES = (".tar", ".tar.gz", ".tgz")
_SAVED = ("state.json", "dataset_dict.json")  # which `save_to_disk` writes
_TABLES = (".parquet", ".arrow", *TAR_FILES)
_ROWS = 10_000  # of a column, at a time
_PICTURES = {*ImageFolder.EXTENSIONS, ".zip"}


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
    path, columns = Path(folder), {"image_column": image_column, "caption_columns": caption_columns}
    if any((path / name).exists() for name in _SAVED):
        return _saved_pairs(path, split, streaming)
    tables = [file for file in path.rglob("*") if file.name.endswith(_TABLES) and file.stem != "metadata"]
    tars = sorted(str(file) for file in tables if file.name.endswith(TAR_FILES))
    if tars and _are_for_tars_alone(tables):
        if split != "train":
            raise ValueError(f"split={split!r}: the tars in {folder!r} are read as a whole; take split='train'.")
        return tar_pairs(tars, streaming=streaming, **columns)
    if tables or _says_its_files(path) or not any(file.suffix.lower() in _PICTURES for file in path.rglob("*")):
        return named_pairs(folder, split, streaming=streaming, **columns)
    files = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    return image_folder_pairs(folder, files, split, streaming)


def _are_for_tars_alone(tables: Sequence[Path]) -> bool:
    """
    Whether `datasets` would not read a folder's tars: they are called `.tgz`, or there is a table of the same name
    beside each, in which img2dataset notes what it did.
    """
    stems = {suffix: {file.name.split(".")[0] for file in tables if file.name.endswith(suffix)} for suffix in _TABLES}
    beside = stems[".parquet"] and stems[".parquet"] <= stems[".tar"]
    return bool(beside or stems[".tgz"])


def _says_its_files(folder: Path) -> bool:
    card = folder / "README.md"
    return card.exists() and bool((metadata_load(card) or {}).get("configs"))


def _saved_pairs(folder: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"split={split!r} of {str(folder)!r}: it has {sorted(splits)}. {error}") from error
    ranges = [(splits[part.splitname], slice(part.from_, part.to)) for part in parts]
    rows = concatenate_datasets([rows.select(range(*part.indices(len(rows)))) for rows, part in ranges])
    shards = max(1, min(len(rows), len(rows.cache_files)))  # for the workers and processes that share a stream
    return rows.to_iterable_dataset(num_shards=shards) if streaming else rows


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
    names = set(split_names(split))
    files = (builder.config.data_files or {}).get(next(iter(names), None), []) if len(names) == 1 else []
    columns = {"image_column": image_column, "caption_columns": caption_columns, "streaming": streaming}
    is_local = os.path.isdir(name)
    if isinstance(builder, Parquet) and files:
        if is_local:
            return parquet_pairs(files, split, **columns, known=builder.info.features)
        return _loaded(name, config, split, streaming, columns=_needed(builder, files, image_column, caption_columns))
    if isinstance(builder, WebDataset) and files and is_local:
        if "[" in split:
            raise ValueError(f"split={split!r}: tars are read as a whole; leave out the slice.")
        return tar_pairs(files, **columns)
    if isinstance(builder, ImageFolder) and is_local:
        return image_folder_pairs(name, builder.config.data_files, split, streaming)
    return _loaded(name, config, split, streaming)


def column_tables(name: str, column: str, config: str | None = None) -> Iterator[pa.Table]:
    """
    Reads a column of a data set's `train` split, or of its only split, in parts. Nothing else is downloaded of parquet
    files, and nothing is kept.

    Args:
        name: Folder or Hub id.
        column: The column.
        config: Name of a configuration.

    Raises:
        ValueError: If there is no such column, or it cannot be said which split to read.
    """
    for table in _column_rows(name, column, config).with_format("arrow").iter(batch_size=_ROWS):
        check_column(name, column, table.column_names)
        yield table


def _column_rows(name: str, column: str, config: str | None) -> IterableDataset:
    if any((Path(name) / saved).exists() for saved in _SAVED):
        return _saved_pairs(Path(name), "train", streaming=True)
    builder, options = _builder(name, config), {}
    files = builder.config.data_files or {}
    if "train" not in files and len(files) != 1:
        raise ValueError(f"{name!r} has the splits {sorted(map(str, files))}; a column is read of a split 'train'.")
    split = "train" if "train" in files else str(next(iter(files)))
    if isinstance(builder, Parquet):
        with fsspec.open(files[split][0]) as opened:
            check_column(name, column, builder.info.features or pq.read_schema(opened).names)
        options["columns"] = [column]
    return load_dataset(name, config, split=split, streaming=True, **options)


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
    if builder.info.features is None:
        with fsspec.open(files[0]) as opened:
            parquet_features(files[0], image_column, caption_columns, opened)
    else:
        check_columns(builder.info.features, repr(builder.repo_id or files[0]), image_column, caption_columns)
    return [image_column, *caption_columns]


def _loaded(name: str, config: str | None, split: str, streaming: bool, **kwargs) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming, **kwargs)
    except DatasetGenerationError as error:
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
