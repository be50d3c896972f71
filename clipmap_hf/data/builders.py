"""Reads parquet files and image folders by the builders of `datasets`, of the columns that are needed alone."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, Features, Image, IterableDataset, List, Value
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet

from clipmap_hf.data.columns import check_images, check_present, common_kind, split_names


__all__ = ["image_folder_pairs", "parquet_features", "parquet_pairs"]

logger = logging.getLogger(__name__)


def parquet_pairs(
    files: Sequence[str],
    split: str,
    image_column: str,
    caption_columns: Sequence[str],
    streaming: bool,
    known: Features | None = None,
) -> Dataset | IterableDataset:
    """
    Reads pairs from parquet files. The files may differ in other columns, in how they store images, and in whether a
    caption is a string or a list of strings; then it is a list in all of them.

    Args:
        files: Paths of the files.
        split: Name of the split that they are, or a slice of it.
        image_column: Column of the images.
        caption_columns: Other columns to read.
        streaming: Whether to read the files in every pass.
        known: Features that a data set's card gives, which know the names of classes.

    Raises:
        ValueError: If a file is not parquet, lacks a column, or has another kind of values in it than others.
    """
    found = [parquet_features(file, image_column, caption_columns) for file in files]
    sources = [*found, known or {}]
    features = Features({image_column: Image(decode=False)})
    for column in dict.fromkeys(caption_columns):
        features[column] = common_kind(column, [one[column] for one in sources if column in one])
    stats = [(path, os.stat(path)) for path in map(os.path.abspath, files)]
    listed = DataFilesList(  # by hand, since a pattern would read [1] in a name as a choice of letters
        [path for path, _ in stats], [(str(stat.st_size), str(stat.st_mtime_ns)) for _, stat in stats]
    )
    builder = _MixedParquet(
        hash=_MixedParquet.__name__,
        data_files=DataFilesDict({split_names(split)[0]: listed}),
        columns=list(features),
        features=features,
    )
    return _built(builder, split, streaming)


def parquet_features(
    file: str, image_column: str, caption_columns: Sequence[str], opened: BinaryIO | None = None
) -> Features:
    """
    Reads the features of the columns that are read; others may be of types that `datasets` does not know.

    Args:
        file: Path of a parquet file.
        image_column: Column of the images.
        caption_columns: Other columns to read.
        opened: The file, if its path is none of this machine.

    Raises:
        ValueError: If the file is not parquet, lacks a column, or its image column holds no images.
    """
    try:
        schema = pq.read_schema(opened or file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file!r} is no parquet file, or is cut off: {error}") from error
    check_present(schema.names, repr(file), image_column, caption_columns)
    wanted = pa.schema([schema.field(name) for name in dict.fromkeys([image_column, *caption_columns])])
    features = Features.from_arrow_schema(wanted.with_metadata(schema.metadata))
    check_images(features[image_column], repr(file), image_column)
    return features


class _MixedParquet(Parquet):
    """Makes a list of a caption that is a string, where other files have lists."""

    def _cast_table(self, pa_table: pa.Table) -> pa.Table:
        for index, name in enumerate(pa_table.column_names):
            column, feature = pa_table.column(index), self.info.features[name]
            if feature == List(Value("string")):
                pa_table = pa_table.set_column(index, name, _as_lists(column))
            elif feature == Value("string"):
                pa_table = pa_table.set_column(index, name, column.cast(pa.string()))
        return super()._cast_table(pa_table)


def _as_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of strings of any kind; of strings, a list of one for each, and none for what is missing."""
    if not _is_text(column.type):
        return column.cast(pa.list_(pa.string()))
    chunks = [_each_in_a_list(chunk) for chunk in column.cast(pa.string()).chunks]
    return pa.chunked_array(chunks, pa.list_(pa.string()))


def _each_in_a_list(texts: pa.Array) -> pa.Array:
    present = pc.cast(pc.is_valid(texts), pa.int32())
    ends = pc.cumulative_sum(present)  # (texts,)
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])  # (texts + 1,)
    return pa.ListArray.from_arrays(offsets, texts.drop_null())


def _is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of strings, or of nothing but missing values."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))


def image_folder_pairs(folder: str, files: DataFilesDict, split: str, streaming: bool) -> Dataset | IterableDataset:
    """
    Reads a folder of images, as `load_dataset("imagefolder")` does, with two differences: all that stands in a
    `metadata.csv` is text, words such as None, NA and nan too; and images that the metadata do not name are counted,
    and said.

    Args:
        folder: The folder, for messages.
        files: Its files by split.
        split: Split, or a slice of it.
        streaming: Whether to read the files in every pass.

    Raises:
        ValueError: If there is no such split.
    """
    builder = _TextImageFolder(hash=_TextImageFolder.__name__, data_files=files)
    unnamed, images = builder.unnamed_images([file for name in split_names(split) for file in files.get(name, ())])
    if unnamed:
        logger.warning(
            "%d of the %d images in %s are not named in its metadata, and left out.", unnamed, images, folder
        )
    return _built(builder, split, streaming)


class _TextImageFolder(ImageFolder):
    """Reads the cells of a `metadata.csv` as the text that they are."""

    def _read_metadata(self, metadata_file: str, metadata_ext: str = "") -> Iterator[pa.Table]:
        if metadata_ext != ".csv":
            yield from super()._read_metadata(metadata_file, metadata_ext=metadata_ext)
            return
        for frame in pd.read_csv(metadata_file, dtype=str, keep_default_na=False, chunksize=10_000):
            yield pa.Table.from_pandas(frame, preserve_index=False)

    def unnamed_images(self, files: Sequence[str]) -> tuple[int, int]:
        """How many images no metadata name, and how many images there are. Archives are not looked into."""
        images, metadata, _ = self._split_files_and_metadata_and_archives(files)
        if not metadata:
            return 0, len(images)
        named = set()
        for file in metadata:
            for table in self._read_metadata(file, metadata_ext=os.path.splitext(file)[1]):
                for column in [name for name in table.column_names if name.endswith(("file_name", "file_names"))]:
                    names = (name for cell in table[column].to_pylist() for name in _each(cell))
                    named |= {os.path.normpath(Path(file).parent / name) for name in names}
        return len({os.path.normpath(image) for image in images} - named), len(images)


def _each(cell: str | list[str] | None) -> list[str]:
    return cell if isinstance(cell, list) else [cell] if cell else []


def _built(builder: DatasetBuilder, split: str, streaming: bool) -> Dataset | IterableDataset:
    if streaming:
        return builder.as_streaming_dataset(split)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise ValueError(f"The data cannot be read: {error.__cause__ or error}") from error
    return builder.as_dataset(split)
