"""Selects the columns of pairs that will be read, and leaves images undecoded."""

from collections.abc import Sequence

from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Value


__all__ = ["MissingColumnError", "check_columns", "undecoded"]

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
    missing = [column for column in (image_column, *columns) if column not in features]
    if missing:
        raise MissingColumnError(source, missing, list(features))
    kind = features[image_column]
    if not _holds_images(kind):
        raise ValueError(
            f"Column {image_column!r} of {source} holds {kind}, but an image a row is needed: the bytes of a file, "
            "its path, or both as {'bytes': …, 'path': …}. Of a list of images, take one into a column of its own."
        )


def _holds_images(kind: object) -> bool:
    if isinstance(kind, Value):
        return kind.dtype in ("string", "large_string", "binary", "large_binary", "null")
    if isinstance(kind, dict):
        return bool({"bytes", "path"} & kind.keys())
    depth = 0
    while isinstance(kind, _LISTS):  # an array, as nested lists of numbers
        kind, depth = kind[0] if isinstance(kind, list) else kind.feature, depth + 1
    return not depth or (depth >= 2 and isinstance(kind, Value) and not kind.dtype.endswith(("string", "binary")))


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
