"""Labeled images as batches for zero-shot classification."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.images import BadRowError


__all__ = ["class_names", "labeled_batches"]


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """
    The names of the classes: of a `ClassLabel` column its own, of a string column the sorted distinct values.

    Raises:
        ValueError: If the column holds neither.
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
    Batches of `pixel_values (batch, 3, height, width)` and `labels (batch,)`, in order.

    Args:
        dataset: Has undecoded images in `image` and the labels in `label_column`, as `load_pairs` gives them.
        image_processor: The model's.
        label_column: Column of class numbers, or of strings that are among `names`.
        names: The classes in the order of the labels.
        batch_size: Images per batch.

    Raises:
        BadRowError: If an image cannot be decoded or has no label; an evaluation leaves nothing out.
    """
    number = {name: index for index, name in enumerate(names)}
    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        images = [decoded(row)[1] for row in rows]
        labels = rows[label_column]
        if None in labels:
            raise BadRowError("no label", f"row {start + list(labels).index(None)}")
        labels = [label if isinstance(label, int) else number[label] for label in labels]
        pixels = image_processor(images, return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels, "labels": torch.tensor(labels)}
