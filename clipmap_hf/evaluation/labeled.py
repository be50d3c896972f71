"""Labeled images as batches for zero-shot classification."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from clipmap_hf.data.images import decode_image, image_bytes


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
    return sorted(set(dataset[label_column]))


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
        BadRowError: If an image cannot be decoded; an evaluation leaves nothing out.
    """
    number = {name: index for index, name in enumerate(names)}
    for start in range(0, len(dataset), batch_size):
        rows = dataset[start : start + batch_size]
        images = [decode_image(image_bytes(image)) for image in rows["image"]]
        labels = [label if isinstance(label, int) else number[label] for label in rows[label_column]]
        pixels = image_processor(images, return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels, "labels": torch.tensor(labels)}
