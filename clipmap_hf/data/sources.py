"""Loads the pairs that arguments name, for training and for evaluation, and tells sources of pairs apart."""

import glob
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.augment import Augmentation, SeededTransform
from clipmap_hf.data.captions import filled_texts
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.columns import MissingColumnError
from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.keys import content_key
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.mixing import Mixing
from clipmap_hf.data.pairs import (
    PairSource,
    given_pairs,
    images_alone,
    load_pairs,
    name_and_config,
    pairs_or_images,
)
from clipmap_hf.data.text_sources import WORDS
from clipmap_hf.data.validation import validation_part


__all__ = [
    "described",
    "evaluation_batches",
    "evaluation_rows",
    "source_files",
    "stage_seed",
    "training_collator",
    "training_pairs",
]

_SAMPLE = 16  # rows of a data set that tell it from another
_TEXTS = 64  # of a source that stand for all


def training_pairs(data: DataArguments) -> PairDataset | PairStream:
    """
    Loads the training pairs that `data` names, and the images without captions, but for those held out for validation.

    Raises:
        ValueError: If there are images alone, and no texts are named; or as in `load_pairs`.
    """
    parts = _parts(data, data.read_columns)
    if data.streaming:
        return PairStream(parts[0], data.shuffle_buffer)
    return PairDataset(validation_part(_joined(parts), data.validation_fraction, held_out=False))


def _parts(data: DataArguments, columns: Sequence[str]) -> list[Dataset | IterableDataset]:
    """The pairs, with these columns, and the images without captions."""
    sources = [(data.train_data, columns), (data.train_images, [])]
    return [_rows(data, source, columns) for source, columns in sources if source is not None]


def _joined(parts: Sequence[Dataset]) -> Dataset:
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _rows(data: DataArguments, source: PairSource, columns: Sequence[str]) -> Dataset | IterableDataset:
    reading = {"split": data.train_split, "image_column": data.image_column, "streaming": data.streaming}
    try:
        return load_pairs(source, caption_columns=columns, **reading)
    except MissingColumnError as error:
        if not images_alone(error.there, data.image_column):
            raise
        raise ValueError(
            f"{error} Images without captions need texts: give the images as train_images, or name the texts in "
            "train_texts (`words` will do)."
        ) from error


def some_texts(data: DataArguments, rows: Dataset | IterableDataset) -> list[str]:
    """
    Takes some of the texts that a run is trained on, of each source but `words`, which are known.

    Args:
        data: Names the texts.
        rows: The training pairs, of which the first captions are read.
    """
    texts, caption = [], data.caption_column[0]
    for name, source in (data.texts.sources if data.texts is not None else {}).items():
        texts += source[:: max(1, len(source) // _TEXTS)][:_TEXTS] if name != WORDS else []
    if data.read_columns:
        texts += [text for row in rows.select_columns([caption]).take(_TEXTS) for text in filled_texts(row[caption])]
    return texts


def described(source: PairSource) -> str:
    """
    Describes a source of pairs, so that a change can be noticed: its path or Hub id, or of a data set that a program
    holds its size, its columns and a digest of some of its rows.
    """
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    pairs = given_pairs(source)
    columns = sorted(pairs.column_names or ())
    if not isinstance(pairs, Dataset):
        return f"a stream with the columns {columns}"
    rows = pairs.select(range(0, len(pairs), max(1, len(pairs) // _SAMPLE)))
    digest = content_key(repr(rows.with_format("arrow")[:].to_pylist()))
    return f"{len(pairs)} rows with the columns {columns}, {digest:016x}"


def training_collator(
    data: DataArguments,
    processor: ProcessorMixin,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    partners: Dataset | IterableDataset | None = None,
) -> PairCollator:
    """
    Makes the collator of training pairs, which augments images.

    Args:
        data: How pairs are read and augmented.
        processor: A `CLIPProcessor`.
        seed: Seed of all that is random.
        transform: Takes the place of the augmentation, as in `SeededTransform`.
        partners: Rows of images to mix others with, if `data` asks for that.
    """
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
        data.sampling,
        augmentation if transform is None else SeededTransform(transform),
        seed,
        texts=data.texts,
        mixing=Mixing(data.mix, partners) if data.mix else None,
    )


def evaluation_rows(data: DataArguments, other: PairSource | None = None) -> Dataset | None:
    """
    Loads the evaluation pairs that `data` names, in `eval_data` or as a `validation_fraction` of what is trained on;
    `None` if it names none. They are images without captions if those of a held-out share are not read; or if
    `eval_data` has none, and there are texts to measure agreement on.

    Args:
        data: Names the pairs.
        other: Read in place of what `data` names, as `eval_data`.

    Raises:
        MissingColumnError: If captions are not there, and cannot be done without.
    """
    source, split = data.evaluated if other is None else (other, data.eval_split)
    if source is None:
        return None
    reading = {"split": split, "image_column": data.image_column}
    if data.validation_fraction and other is None:
        captions = data.read_columns[:1]
        parts = _parts(data, captions)
        rows = parts[0] if captions else _joined(parts)  # captions are those of pairs, which come first
        return validation_part(rows, data.validation_fraction, held_out=True)
    if data.parted_texts is not None and data.parted_texts.evaluated:
        return pairs_or_images(source, caption_column=data.caption_column[0], **reading)
    return load_pairs(source, caption_columns=data.caption_column[:1], **reading)


def evaluation_batches(
    data: DataArguments, processor: ProcessorMixin, batch_size: int = 256, num_workers: int = 0
) -> DataLoader | None:
    """
    Loads batches of preprocessed evaluation pairs, with all captions of the first caption column, or of images alone
    (`evaluation_rows`). Several processes share them.

    Args:
        data: Names the pairs.
        processor: Tokenizer and image processor of the model.
        batch_size: Images per batch.
        num_workers: Worker processes that decode images.

    Returns:
        The batches, or `None` if `data` names no evaluation pairs.

    Raises:
        ValueError: If there are fewer pairs than processes.
    """
    rows = evaluation_rows(data)
    if rows is None:
        return None
    caption = data.caption_column[0]
    return evaluation_pairs(
        rows,
        processor,
        caption_column=caption if caption in rows.column_names else None,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def source_files(data: DataArguments, source: PairSource | None = None) -> dict[str, Any]:
    """
    Describes the source of the training pairs or images, so that a change can be noticed: names and sizes of its
    files, or its Hub id, and the split, the image column and the share that is held out.

    Args:
        data: Names the source.
        source: Another source, which is read in the same way.
    """
    named = [data.train_data, data.train_images] if source is None else [source]
    first, *others = map(_files, filter(lambda source: source is not None, named))
    found = first | {"split": data.train_split, "image_column": data.image_column}
    found |= {"images": others[0]} if others else {}
    return {**found, "validation_fraction": data.validation_fraction} if data.validation_fraction else found


def _files(source: PairSource) -> dict[str, Any]:
    is_path = isinstance(source, (str, os.PathLike))
    name, config = name_and_config(os.fspath(source)) if is_path else ("", None)
    files = {"files": (is_path and _sizes(name)) or described(source)}
    return files | {"config": config} if config else files


def _sizes(name: str) -> dict[str, int | str]:
    """
    The sizes of the files of a folder, path or glob, by their names from the folder on that all share: files of equal
    names may lie in different folders. Hidden files are left out, which tools keep there. Metadata, whose captions may
    change without their length, have a digest beside their size.
    """
    path = Path(name)
    if path.is_dir():
        found = path.rglob("*")
    elif path.exists():  # its name may look like a glob
        found = [path]
    else:
        found = map(Path, glob.glob(name, recursive=True))
    files = sorted(file for file in found if file.is_file())
    shared = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    named = ((file.relative_to(shared), file) for file in files)
    return {
        path.as_posix(): _size(file) for path, file in named if not any(part.startswith(".") for part in path.parts)
    }


def _size(file: Path) -> int | str:
    size = file.stat().st_size
    return f"{size} {content_key(file.read_bytes()):016x}" if file.stem == "metadata" else size


def stage_seed(name: str, seed: int) -> int:
    """
    Returns the seed of a training stage. If all stages shared a seed, the second stage would see the batches and crops
    of the first stage again.
    """
    return zlib.crc32(f"{name}-{seed}".encode())
