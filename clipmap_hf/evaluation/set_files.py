"""Finds the files of an evaluation set, in a folder or on the Hub, and reads class names, prompts and rows."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import snapshot_download

from clipmap_hf.data.captions import filled_texts
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.tar_shards import StrictHeader, member_key
from clipmap_hf.evaluation.sets import EvalSet


__all__ = ["SetFiles", "SetRows", "find_set"]

_NAMES, _TEMPLATES, _TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"


@dataclass(frozen=True)
class SetFiles:
    """
    The files of a set, and the contents of its text files.

    Args:
        shards: The set's tars or parquet files, in order.
        names: Names of the classes, in the order of the labels; empty for retrieval.
        templates: Prompts with `{}` in place of the class name; empty for retrieval.
        commit: Commit of the files on the Hub; `None` for a local set.
    """

    shards: tuple[Path, ...]
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    commit: str | None = None


def find_set(eval_set: EvalSet, sets_dir: str | Path | None = None) -> SetFiles:
    """
    Finds the files of a set: in `sets_dir` if it is given, and otherwise on the Hub. Files from the Hub are downloaded
    unless they are in the cache.

    Args:
        eval_set: The set.
        sets_dir: A folder that holds a folder for each set, with the name and the files that the set has on the Hub.

    Raises:
        ValueError: If a file is missing, or the files are for another task than `eval_set.task`.
        OSError: If the Hub cannot be reached.
    """
    if sets_dir is None:
        patterns = ["*.txt", f"{eval_set.split}/*"]
        folder = Path(
            snapshot_download(
                eval_set.hub_id, repo_type="dataset", revision=eval_set.revision, allow_patterns=patterns
            )
        )
    else:
        folder = Path(sets_dir) / eval_set.folder
    commit = folder.name if sets_dir is None else None
    shards = _find_shards(folder / eval_set.split)
    kind = (folder / _TYPE).read_text(encoding="utf-8").strip() if (folder / _TYPE).is_file() else "classification"
    if kind != eval_set.task:
        raise ValueError(f"'{folder}' holds a set for {kind!r} by its {_TYPE}, not for {eval_set.task!r}.")
    if eval_set.task == "retrieval":
        return SetFiles(shards, commit=commit)
    templates = [line.replace("{c}", "{}") for line in _read_lines(folder / _TEMPLATES)]
    return SetFiles(shards, tuple(_read_lines(folder / _NAMES)), tuple(templates), commit)


def _find_shards(folder: Path) -> tuple[Path, ...]:
    if (folder / "nshards.txt").is_file():
        shards = [
            folder / f"{number}.tar" for number in range(int((folder / "nshards.txt").read_text(encoding="utf-8")))
        ]
    else:
        shards = sorted(folder.glob("*.parquet"))
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not shards:
        raise ValueError(
            f"'{folder}' must hold nshards.txt with the number of tars, and these tars (0.tar, 1.tar, …); or it must "
            f"hold parquet files. Missing are {missing[:5] or 'all'}; download the whole set."
        )
    return tuple(shards)


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no file '{path}', which a set for classification needs; download the whole set.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").strip().split("\n")]
    if not all(lines):
        raise ValueError(
            f"'{path}' has a blank line, number {lines.index('') + 1}. Every line must hold an entry, since the label "
            "of a class is the number of its line."
        )
    return lines


class SetRows(torch.utils.data.Dataset):
    """
    The rows of a set. Each row has an `image` (undecoded) and a `label`: the number of its class, a list with 0 or 1
    for every class, or a list of captions. A row is read from disk when it is asked for.

    Args:
        eval_set: The set.
        files: Its files.

    Raises:
        ValueError: If a file cannot be read to its end, or has no column of images or labels.
        BadRowError: If a row has no image or no valid label. An evaluation leaves no row out.
    """

    def __init__(self, eval_set: EvalSet, files: SetFiles):
        self.eval_set = eval_set
        open_table = _TarTable if files.shards[0].suffix == ".tar" else _load_parquet
        self._table = open_table(files.shards, eval_set)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        image = next((row[column] for column in self.eval_set.image_columns if row.get(column) is not None), None)
        try:
            label = _LABEL_READERS[self.eval_set.task](row[self.eval_set.label_column])
        except (ValueError, TypeError, EOFError) as error:
            raise BadRowError("no label", f"row {index}: {error}") from error
        return {"image": image, "label": label}


class _TarTable:
    """The rows of several tars, with random access by an index of the places of their files."""

    def __init__(self, shards: Sequence[Path], eval_set: EvalSet):
        self.label_column = eval_set.label_column
        self._index = [row for path in shards for row in _index_tar(path, eval_set)]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, places = self._index[index]
        row = {}
        with path.open("rb") as file:
            for column, (offset, size) in places.items():
                file.seek(offset)
                content = file.read(size)
                row[column] = content if column == self.label_column else {"bytes": content, "path": None}
        return row


def _index_tar(path: Path, eval_set: EvalSet) -> list[tuple[Path, dict[str, tuple[int, int]]]]:
    """Returns, for each row of a tar, the tar's path, and the offset and the size of each column's file."""
    wanted, rows = {eval_set.label_column, *eval_set.image_columns}, []
    try:
        with tarfile.open(path, "r:", tarinfo=StrictHeader) as tar:
            members = [(*member_key(info.name), info.offset_data, info.size) for info in tar if info.isreg()]
        members = [member for member in members if all(member[:2])]  # files without a key or column are in no row
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read to its end ({error}); download it again.") from error
    for key, group in groupby(members, key=lambda member: member[0]):
        group = [member for member in group if member[1] in wanted]
        places = {column: place for _, column, *place in group}
        if len(group) != 2 or eval_set.label_column not in places:
            raise BadRowError(
                "not one image and one label",
                f"{path}::{key} has {[column for _, column, *_ in group]}; it needs {eval_set.label_column!r} and one "
                f"of {list(eval_set.image_columns)}",
            )
        rows.append((path, places))
    return rows


def _load_parquet(shards: Sequence[Path], eval_set: EvalSet) -> datasets.Dataset:
    table = datasets.load_dataset("parquet", data_files=list(map(str, shards)), split="train")
    images = [column for column in eval_set.image_columns if column in table.column_names]
    if not images or eval_set.label_column not in table.column_names:
        raise ValueError(
            f"'{shards[0]}' has the columns {table.column_names}; it needs {eval_set.label_column!r} and one of "
            f"{list(eval_set.image_columns)}."
        )
    table = table.select_columns([*images, eval_set.label_column])
    for column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _read_class(label: bytes | int) -> int:
    return int(label)


def _read_flags(label: bytes | list[float]) -> list[int]:
    values = np.load(io.BytesIO(label), allow_pickle=False) if isinstance(label, bytes) else np.asarray(label)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"0 or 1 for every class was expected, got {values.tolist()}")
    return values.astype(int).tolist()


def _read_captions(label: bytes | str) -> list[str]:
    captions = filled_texts((label.decode() if isinstance(label, bytes) else label).splitlines())
    if not captions:
        raise ValueError("no caption")
    return captions


_LABEL_READERS = {"classification": _read_class, "multilabel": _read_flags, "retrieval": _read_captions}
