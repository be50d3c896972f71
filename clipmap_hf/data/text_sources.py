"""Reads texts by the name of their source: text files, class names, columns of tables and data sets, word lists."""

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from clipmap_hf.data.prompts import DEFAULT_TEMPLATES
from clipmap_hf.data.words import word_texts


__all__ = ["CAPTIONS", "CLASS_NAMES", "WORDS", "check_column", "read_texts"]

CAPTIONS = "captions"
WORDS = "words"
CLASS_NAMES = "labels:"
_WORD_TEXTS = 20_000
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TABLES = (".parquet", ".jsonl", *_SEPARATORS)


def read_texts(name: str) -> list[str]:
    """
    Reads the texts of a source. Blank texts are left out, and of a column those that occur again.

    Args:
        name: A text file (`queries.txt`), class names in CLIP's prompts (`labels:names.txt`), a column of a table
            (`pairs.parquet:title`; also `.csv`, `.tsv` and `.jsonl`) or of a data set (`owner/name:title`,
            `owner/name:config:title`), or `words`. Files may end in `.gz`.

    Raises:
        ValueError: If it is none of these, there is no such column, or a file is damaged or not UTF-8.
        OSError: If a file cannot be read.
        ImportError: If `words` is named, and the extra of this name is not installed.
    """
    if name == WORDS:
        return word_texts(_WORD_TEXTS)
    try:
        if name.startswith(CLASS_NAMES):
            labels = list(_lines(name.removeprefix(CLASS_NAMES)))
            return [template.replace("{}", label) for label in labels for template in DEFAULT_TEMPLATES]
        if _extension(name) == ".txt":
            return list(_lines(name))
        source, colon, column = name.rpartition(":")
        if colon and _extension(source) in _TABLES:
            files = [source] if os.path.exists(source) else sorted(glob.glob(source)) or [source]
            return _distinct(value for file in files for value in _cells(file, column))
    except (UnicodeDecodeError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise ValueError(f"train_texts={name!r} cannot be read as UTF-8 text of its format: {error}") from error
    if colon and (os.path.isdir(source.partition(":")[0]) or "/" in source):
        return _distinct(_data_set_cells(source, column))
    raise ValueError(
        f"train_texts={name!r} names no texts. Allowed are a file of texts ('queries.txt'), of class names "
        f"('{CLASS_NAMES}names.txt'), a column of a table ('pairs.parquet:caption', .csv, .tsv, .jsonl) or of a data "
        f"set ('owner/name:caption'), {WORDS!r}, and {CAPTIONS!r}."
    )


def _extension(path: str) -> str:
    """What says the format of a file; some systems write extensions in capitals."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _lines(path: str) -> Iterator[str]:
    opened = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:  # some editors begin a file with a mark
        yield from filter(None, map(str.strip, file))


def _cells(path: str, column: str) -> Iterable[Any]:
    extension = _extension(path)
    if extension == ".parquet":
        check_column(path, column, pq.read_schema(path).names)
        return pq.read_table(path, columns=[column]).column(0).to_pylist()
    if extension == ".jsonl":
        return _json_cells(path, column)
    layout = pa_csv.ParseOptions(delimiter=_SEPARATORS[extension], newlines_in_values=True)
    table = pa_csv.open_csv(path, parse_options=layout)
    check_column(path, column, table.schema.names)
    # All that stands there is text, words such as NA too.
    text = pa_csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
    return pa_csv.read_csv(path, parse_options=layout, convert_options=text).column(0).to_pylist()


def _json_cells(path: str, column: str) -> Iterator[Any]:
    row, is_there = {}, False
    for line in _lines(path):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path!r} has a line that is no object with columns: {line[:40]!r}. Repair it.")
        is_there = is_there or column in row  # a row may leave it out
        yield row.get(column)
    check_column(path, column, [column] if is_there else list(row))


def _data_set_cells(source: str, column: str) -> Iterator[Any]:
    from clipmap_hf.data.folders import column_tables  # imports `datasets`, for which `--help` must not wait
    from clipmap_hf.data.pairs import name_and_config
    from clipmap_hf.files.hub_ids import check_hub_id

    name, config = name_and_config(source)
    if not os.path.isdir(name):
        check_hub_id(name, "dataset")
    for table in column_tables(name, column, config):
        yield from table.column(column).to_pylist()


def check_column(name: str, column: str, found: Iterable[str]) -> None:
    """
    Checks that a table or data set has a column.

    Args:
        name: Of the table, for the error message.
        column: The column.
        found: Its columns.

    Raises:
        ValueError: If it is not among them.
    """
    if column not in found:
        raise ValueError(f"{name!r} has no column {column!r}; it has {list(found)}.")


def _distinct(cells: Iterable[Any]) -> list[str]:
    texts = (text for cell in cells for text in (cell if isinstance(cell, list) else [cell]))
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
