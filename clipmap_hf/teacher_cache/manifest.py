"""Collects the settings that the embeddings in a teacher cache depend on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.training_pixels import USUAL_DIVISOR, TrainingPixels
from clipmap_hf.models.fingerprints import tokenizer_fingerprint


__all__ = ["cache_manifest"]

_FORMAT = 1


def cache_manifest(
    teachers: Sequence[Mapping[str, Any]], collator: PairCollator, views: int, data: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Collects everything that the embeddings in a cache depend on, as plain JSON values.

    Args:
        teachers: Values that identify each teacher: id, revision, `model_fingerprint`, projection dimension.
        collator: Makes the views and captions.
        views: Number of views per image.
        data: Values that identify the pairs, such as names and sizes of files.

    Raises:
        ValueError: If the collator does not augment.
    """
    if collator.augmentation is None:
        raise ValueError("A teacher cache holds augmented views; give the collator an augmentation, as for training.")
    manifest = {
        "format": _FORMAT,
        "teachers": list(teachers),
        "image_processor": _pixel_values(collator.pixels),
        "tokenizer": {
            "hash": tokenizer_fingerprint(collator.tokenizer),
            "model_max_length": collator.tokenizer.model_max_length,
        },
        "augmentation": dataclasses.asdict(collator.augmentation),
        "seed": collator.seed,
        "views": views,
        "captions": {
            "caption_columns": list(collator.caption_columns),
            "keyword_columns": list(collator.keyword_columns),
            "caption_sampling": collator.caption_sampling,
        },
        "data": data,
    }
    manifest["captions"] |= {"texts": collator.texts.digest} if collator.texts is not None else {}
    manifest |= {"mixing": collator.mixing.digest} if collator.mixing is not None else {}
    return json.loads(json.dumps(manifest))


def _pixel_values(pixels: TrainingPixels) -> dict[str, Any]:
    """What is usual is not named: the manifests of caches that were built before do not name it."""
    height, width = pixels.size
    values = {"size": height if height == width else [height, width], "mean": pixels.mean, "std": pixels.std}
    values |= {"divisor": pixels.divisor} if pixels.divisor != USUAL_DIVISOR else {}
    return values | ({"resample": pixels.resample.name} if pixels.resample != Image.Resampling.BICUBIC else {})
