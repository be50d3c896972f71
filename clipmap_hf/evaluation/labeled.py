"""Makes batches of labeled images for zero-shot classification."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.preprocess import preprocessed


__all__ = ["class_names", "labeled_batches"]


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """
    Returns the names of the classes: those of a `ClassLabel` column, or the sorted distinct values of a string column.

    Args:
        dataset: The data set.
        label_column: Column of the labels.

    Raises:
        ValueError: If the column holds neither class labels nor strings.
    """
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if feature.dtype != "string":
        raise ValueError(f"Column {label_column!r} holds {feature.dtype}; class names need a ClassLabel or strings.")
    return sorted({label for label in dataset[label_column] if label is not None})


def labeled_batches(
    dataset: Dataset, image_processor: Any, label_column: str, names: Sequence[str], batch_size: int = 256
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Yields batches of `pixel_values (batch, 3, height, width)` and `labels (batch,)`, in the order of the rows.

    Args:
        dataset: A data set as `load_pairs` returns it, with undecoded images in `image` and labels in `label_column`.
        image_processor: The model's image processor.
        label_column: Column of the labels: class numbers, or strings that are among `names`.
        names: Names of the classes, in the order of the class numbers.
        batch_size: Images per batch.

    Raises:
        BadRowError: If an image cannot be decoded or has no label. An evaluation leaves no row out.
    """
    number = {name: index for index, name in enumerate(names)}
    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        images = [decoded(row)[1] for row in rows]
        labels = rows[label_column]
        if None in labels:
            raise BadRowError("no label", f"row {start + list(labels).index(None)}")
        labels = [label if isinstance(label, int) else number[label] for label in labels]
        yield {"pixel_values": preprocessed(image_processor, images), "labels": torch.tensor(labels)}
