"""The files of an evaluation set, local or from the Hub: class names, prompt templates, and every row."""

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

from clipmap_hf.data.collate import filled_texts
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.tar_shards import StrictHeader, member_key
from clipmap_hf.evaluation.sets import EvalSet


__all__ = ["SetFiles", "SetRows", "find_set"]

_NAMES, _TEMPLATES, _TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"


@dataclass(frozen=True)
class SetFiles:
    """
    Where a set lies, and what its text files say.

    Args:
        shards: Its tars or parquet files, in order.
        names: Of the classes, in the order of the labels; none for retrieval.
        templates: Prompts with `{}` where a name goes; none for retrieval.
        commit: On the Hub, if it comes from there.
    """

    shards: tuple[Path, ...]
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    commit: str | None = None


def find_set(eval_set: EvalSet, sets_dir: str | Path | None = None) -> SetFiles:
    """
    The files of a set: those in its folder in `sets_dir`, or else those on the Hub, downloaded if they are not in its
    cache.

    Args:
        eval_set: Which set.
        sets_dir: A folder with one folder per set, named like it on the Hub, of the same files.

    Raises:
        ValueError: If a file is missing, or the set is of another kind than `eval_set.task`.
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
    shards = _shards(folder / eval_set.split)
    kind = (folder / _TYPE).read_text().strip() if (folder / _TYPE).is_file() else "classification"
    if kind != eval_set.task:
        raise ValueError(f"'{folder}' holds a set for {kind!r} by its {_TYPE}, not for {eval_set.task!r}.")
    if eval_set.task == "retrieval":
        return SetFiles(shards, commit=commit)
    templates = [line.replace("{c}", "{}") for line in _lines(folder / _TEMPLATES)]
    return SetFiles(shards, tuple(_lines(folder / _NAMES)), tuple(templates), commit)


def _shards(folder: Path) -> tuple[Path, ...]:
    if (folder / "nshards.txt").is_file():
        shards = [folder / f"{number}.tar" for number in range(int((folder / "nshards.txt").read_text()))]
    else:
        shards = sorted(folder.glob("*.parquet"))
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not shards:
        raise ValueError(
            f"'{folder}' must hold nshards.txt, which says how many, and as many tars 0.tar, 1.tar, …; or parquet "
            f"files. Missing are {missing[:5] or 'all'}; download the whole set."
        )
    return tuple(shards)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no file '{path}', which a set for classification needs; download the whole set.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").strip().split("\n")]
    if not all(lines):
        raise ValueError(f"'{path}' has a blank line, number {lines.index('') + 1}; labels count lines.")
    return lines


class SetRows(torch.utils.data.Dataset):
    """
    The rows of a set, each with `image` (undecoded) and `label`: a number, a list of 0 and 1, or captions. What is
    needed of a row is read when it is asked for.

    Args:
        eval_set: Which set.
        files: Where it lies.

    Raises:
        ValueError: If a file cannot be read to its end, or has no column of images or labels.
        BadRowError: If a row has no image or label, or none that makes sense; an evaluation leaves nothing out.
    """

    def __init__(self, eval_set: EvalSet, files: SetFiles):
        self.eval_set = eval_set
        table = _TarTable if files.shards[0].suffix == ".tar" else _parquet_table
        self._table = table(files.shards, eval_set)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        image = next((row[one] for one in self.eval_set.image_columns if row.get(one) is not None), None)
        try:
            label = _LABELS[self.eval_set.task](row[self.eval_set.label_column])
        except (ValueError, TypeError, EOFError) as error:
            raise BadRowError("no label", f"row {index}: {error}") from error
        return {"image": image, "label": label, "error": None}


class _TarTable:
    """Rows of tars, read where an index says that they lie."""

    def __init__(self, shards: Sequence[Path], eval_set: EvalSet):
        self.label_column = eval_set.label_column
        self._index = [row for path in shards for row in _tar_index(path, eval_set)]

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


def _tar_index(path: Path, eval_set: EvalSet) -> list[tuple[Path, dict[str, tuple[int, int]]]]:
    """Of every row of a tar, where the file of each column begins and how long it is."""
    wanted, rows = {eval_set.label_column, *eval_set.image_columns}, []
    try:
        with tarfile.open(path, "r:", tarinfo=StrictHeader) as tar:
            members = [(*member_key(one.name), one.offset_data, one.size) for one in tar if one.isreg()]
        members = [member for member in members if all(member[:2])]  # others are no rows
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


def _parquet_table(shards: Sequence[Path], eval_set: EvalSet) -> datasets.Dataset:
    table = datasets.load_dataset("parquet", data_files=list(map(str, shards)), split="train")
    images = [one for one in eval_set.image_columns if one in table.column_names]
    if not images or eval_set.label_column not in table.column_names:
        raise ValueError(
            f"'{shards[0]}' has the columns {table.column_names}; it needs {eval_set.label_column!r} and one of "
            f"{list(eval_set.image_columns)}."
        )
    table = table.select_columns([*images, eval_set.label_column])
    for one in images:
        table = table.cast_column(one, datasets.Image(decode=False))
    return table


def _number(label: bytes | int) -> int:
    return int(label)


def _present(label: bytes | list[float]) -> list[int]:
    values = np.load(io.BytesIO(label), allow_pickle=False) if isinstance(label, bytes) else np.asarray(label)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"0 or 1 for every class was expected, got {values.tolist()}")
    return values.astype(int).tolist()


def _captions(label: bytes | str) -> list[str]:
    captions = filled_texts((label.decode() if isinstance(label, bytes) else label).splitlines())
    if not captions:
        raise ValueError("no caption")
    return captions


_LABELS = {"classification": _number, "multilabel": _present, "retrieval": _captions}
