"""Makes batches of labeled images for zero-shot classification."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.preprocess import preprocessed


__all__ = ["class_names", "labeled_batches"]

_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")

_NAMES_ARE_NEEDED = (
    "Class numbers say nothing to a text tower. Name the classes in the order of their numbers, in `classnames`, or "
    "give a column of strings or of a ClassLabel."
)


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """
    Returns the names of the classes: those of a `ClassLabel` column, or the sorted distinct values of a string column.

    Args:
        dataset: The data set.
        label_column: Column of the labels.

    Raises:
        ValueError: If the column holds neither class labels nor strings, or strings of nothing but numbers, which say
            nothing to a text tower.
    """
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if getattr(feature, "dtype", None) not in ("string", "large_string", "string_view"):
        raise ValueError(f"Column {label_column!r} holds {getattr(feature, 'dtype', feature)}. {_NAMES_ARE_NEEDED}")
    names = sorted({label.strip() for label in dataset[label_column] if label is not None and label.strip()})
    if names and all(_NUMBER.fullmatch(name) for name in names):
        raise ValueError(f"Column {label_column!r} holds class numbers such as {names[0]!r}. {_NAMES_ARE_NEEDED}")
    return names


def labeled_batches(
    dataset: Dataset, image_processor: Any, label_column: str, names: Sequence[str], batch_size: int = 256
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Yields batches of `pixel_values (batch, 3, height, width)` and `labels (batch,)`, in the order of the rows.

    Args:
        dataset: A data set as `load_pairs` returns it, with undecoded images in `image` and labels in `label_column`.
        image_processor: The model's image processor.
        label_column: Column of the labels: class numbers, as integers or in strings, or strings among `names`.
        names: Names of the classes, in the order of the class numbers.
        batch_size: Images per batch.

    Raises:
        ValueError: If a label is neither one of `names` nor the number of one.
        BadRowError: If an image cannot be decoded or has no label. An evaluation leaves no row out.
    """
    number = {name: index for index, name in enumerate(names)}
    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        images = [decoded(row)[1] for row in rows]
        labels = rows[label_column]
        missing = [
            i for i, label in enumerate(labels) if label is None or (isinstance(label, str) and not label.strip())
        ]
        if missing:
            raise BadRowError("no label", f"row {start + missing[0]}")
        labels = torch.tensor([_class_number(label, number) for label in labels])  # (batch,)
        yield {"pixel_values": preprocessed(image_processor, images), "labels": labels}


def _class_number(label: Any, number: Mapping[str, int]) -> int:
    """The number of a class, which a label names, or is, as an integer, or as a string or float of one."""
    word = str(label).strip()
    if word in number:
        return number[word]
    if _NUMBER.fullmatch(word) and 0 <= int(float(word)) < len(number):
        return int(float(word))
    raise ValueError(
        f"The label {label!r} is neither among the {len(number)} class names, such as {next(iter(number))!r}, nor a "
        f"number from 0 to {len(number) - 1}."
    )
