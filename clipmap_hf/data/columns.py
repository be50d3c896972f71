"""Selects the columns of pairs that will be read, and leaves images undecoded."""

import re
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value
from datasets.features.features import FeatureType


__all__ = [
    "ERROR_COLUMN",
    "MissingColumnError",
    "check_columns",
    "check_images",
    "check_present",
    "common_kind",
    "split_names",
    "undecoded",
]

ERROR_COLUMN = "clipmap_error"  # why a row could not be read; a name that no data set has of its own
_LISTS = (List, LargeList, list)


class MissingColumnError(ValueError):
    """
    A source lacks columns.

    Args:
        source: Name of the source.
        missing: The columns that it lacks.
        there: The columns that it has.
    """

    def __init__(self, source: str, missing: Sequence[str], there: Sequence[str]):
        super().__init__(f"{source} has no column {list(missing)}; it has {list(there)}.")
        self.there = tuple(there)


def check_columns(features: Features, source: str, image_column: str, columns: Sequence[str]) -> None:
    """
    Looks whether the columns that will be read are there, and whether one of them holds images.

    Args:
        features: The features of the source.
        source: Name of the source in error messages.
        image_column: Column of the images.
        columns: Other columns.

    Raises:
        MissingColumnError: If a column is missing.
        ValueError: If the image column holds anything but an image a row: a file's bytes, its path, both, or an array.
    """
    check_present(list(features), source, image_column, columns)
    check_images(features[image_column], source, image_column)


def check_present(there: Sequence[str], source: str, image_column: str, columns: Sequence[str]) -> None:
    """Raises a `MissingColumnError` if a column that will be read is not among those that a source has."""
    missing = [column for column in (image_column, *columns) if column not in there]
    if missing:
        raise MissingColumnError(source, missing, there)


def check_images(kind: FeatureType, source: str, image_column: str) -> None:
    """Raises a `ValueError` if a column's feature is not one of images."""
    if not _holds_images(kind):
        raise ValueError(
            f"Column {image_column!r} of {source} holds {kind}, but an image a row is needed: the bytes of a file, "
            "its path, or both as {'bytes': …, 'path': …}. Of a list of images, take one into a column of its own."
        )


def common_kind(column: str, kinds: Sequence[FeatureType]) -> FeatureType:
    """
    The kind of values that a column has in several files: of strings and lists of strings, lists; of class labels and
    their numbers, labels; else that of all of them.

    Args:
        column: The column, for messages.
        kinds: What it is in each file.

    Raises:
        ValueError: If they do not go together.
    """
    text, texts = Value("string"), List(Value("string"))
    plain = [_plain_text(kind) for kind in kinds if kind != Value("null")] or [text]
    if all(kind in (text, texts) for kind in plain):
        return texts if texts in plain else text
    labels = [kind for kind in plain if isinstance(kind, ClassLabel)]
    numbers = all(isinstance(kind, ClassLabel) or "int" in getattr(kind, "dtype", "") for kind in plain)
    if labels and numbers and all(label == labels[0] for label in labels):
        return labels[0]
    if other := next((kind for kind in plain if kind != plain[0]), None):
        raise ValueError(f"Column {column!r} holds {plain[0]} in one file and {other} in another; make them equal.")
    return plain[0]


def _plain_text(kind: FeatureType) -> FeatureType:
    """Strings of any length are one kind, and so are lists of them, or of nothing."""
    if isinstance(kind, (List, LargeList)) and _plain_text(kind.feature) in (Value("string"), Value("null")):
        return List(Value("string"))
    is_text = isinstance(kind, Value) and kind.dtype in ("large_string", "string_view")
    return Value("string") if is_text else kind


def _holds_images(kind: FeatureType) -> bool:
    if isinstance(kind, Value):
        return kind.dtype in ("string", "large_string", "binary", "large_binary", "null")
    if isinstance(kind, dict):
        return bool({"bytes", "path"} & kind.keys())
    depth = 0
    while isinstance(kind, _LISTS):  # an array, as nested lists of numbers
        kind, depth = kind[0] if isinstance(kind, list) else kind.feature, depth + 1
    return not depth or (depth >= 2 and isinstance(kind, Value) and not kind.dtype.endswith(("string", "binary")))


def split_names(split: str) -> list[str]:
    """The splits that a request names, such as `train` and `test` of `train[:10%]+test`."""
    return re.findall(r"(?:^|\+)\s*([\w.]+)", split)


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
        ValueError: If a column is missing, or the image column holds no images.
    """
    if pairs.features is None:
        raise ValueError(f"The columns of {source} are unknown until it is read; load it with streaming=False.")
    check_columns(pairs.features, source, image_column, caption_columns)
    pairs = pairs.select_columns([image_column, *caption_columns])
    if image_column != "image":
        pairs = pairs.rename_column(image_column, "image")
    return pairs.cast_column("image", Image(decode=False))
