"""Loads the pairs that arguments name, for training and for evaluation, and tells sources of pairs apart."""

import glob
import zlib
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.validation import validation_part


__all__ = ["evaluation_batches", "source_files", "stage_seed", "training_collator", "training_pairs"]


def training_pairs(data: DataArguments) -> PairDataset | PairStream:
    """Loads the training pairs that `data` names, without those held out for validation."""
    pairs = load_pairs(
        data.train_data,
        split=data.train_split,
        image_column=data.image_column,
        caption_columns=[*data.caption_column, *data.keyword_column],
        streaming=data.streaming,
    )
    if data.streaming:
        return PairStream(pairs, data.shuffle_buffer)
    return PairDataset(validation_part(pairs, data.validation_fraction, held_out=False))


def training_collator(data: DataArguments, processor, seed: int) -> PairCollator:
    """Makes the collator of training pairs, which augments images. `processor` is a `CLIPProcessor`."""
    augmentation = Augmentation(
        scale=tuple(data.crop_scale),
        flip=data.flip,
        rotation=data.rotation,
        color_jitter=data.color_jitter,
        grayscale=data.grayscale,
    )
    return PairCollator(
        processor.tokenizer,
        processor.image_processor,
        data.caption_column,
        data.keyword_column,
        data.caption_sampling,
        augmentation,
        seed,
    )


def evaluation_batches(
    data: DataArguments, processor, batch_size: int = 256, num_workers: int = 0
) -> DataLoader | None:
    """
    Loads batches of preprocessed evaluation pairs, with all captions of the first caption column. Several processes
    share the pairs.

    Args:
        data: Names the pairs, in `eval_data` or as a `validation_fraction` of `train_data`.
        processor: Tokenizer and image processor of the model.
        batch_size: Images per batch.
        num_workers: Worker processes that decode images.

    Returns:
        The batches, or `None` if `data` names no evaluation pairs.

    Raises:
        ValueError: If there are fewer pairs than processes.
    """
    source, split = data.evaluated
    if source is None:
        return None
    pairs = load_pairs(source, split=split, image_column=data.image_column, caption_columns=data.caption_column[:1])
    return evaluation_pairs(
        validation_part(pairs, data.validation_fraction, held_out=True),
        processor,
        caption_column=data.caption_column[0],
        batch_size=batch_size,
        num_workers=num_workers,
    )


def source_files(data: DataArguments) -> dict[str, Any]:
    """
    Describes the source of the training pairs, so that a change can be noticed: names and sizes of its files, or its
    Hub id, and the split, the image column and the share that is held out.
    """
    path = Path(data.train_data)
    found = sorted(path.rglob("*") if path.is_dir() else map(Path, glob.glob(data.train_data, recursive=True)))
    source = {
        "files": {file.name: file.stat().st_size for file in found if file.is_file()} or data.train_data,
        "split": data.train_split,
        "image_column": data.image_column,
    }
    return {**source, "validation_fraction": data.validation_fraction} if data.validation_fraction else source


def stage_seed(name: str, seed: int) -> int:
    """
    Returns the seed of a training stage. If all stages shared a seed, the second stage would see the batches and crops
    of the first stage again.
    """
    return zlib.crc32(f"{name}-{seed}".encode())
