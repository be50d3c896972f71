"""What all studies learn from: the embedded teacher, the embedded pairs, and those to choose learning rates by."""

import math
import os
from functools import cache
from pathlib import Path
from random import Random

import datasets

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import training_pairs
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher


SOURCE = ModelId(str(TEACHER))
HELD_OUT = "emojione"  # the style that learning rates are chosen on, and how many of its drawings
HELD_OUT_PAIRS = 1000


@cache
def embedded_teacher() -> Teacher:
    """Loads the embedded teacher, once."""
    return Teacher.load(*SOURCE)


@cache
def embedded_data(folder: Path, validation: bool) -> DataArguments:
    """
    Names the training pairs, and others to evaluate on: of an unseen style, or in validation of a style that is held
    out of the training pairs.

    Args:
        folder: Of the study.
        validation: Whether learning rates are to be chosen.
    """
    train, test = _held_out(folder / "validation") if validation else (TRAIN_PAIRS, TEST_PAIRS)
    return DataArguments(
        str(train), eval_data=str(test), keyword_column=["keywords"], caption_sampling="random", crop_scale=[0.7, 1.0]
    )


def epochs(data: DataArguments, steps: int, batch_size: int) -> int:
    """Counts the epochs that steps take, with the last, which may break off: as many views of each pair are seen."""
    return math.ceil(steps / (_pair_count(data.train_data) // batch_size))


@cache
def _pair_count(path: str) -> int:
    return len(training_pairs(DataArguments(path)))


def _held_out(folder: Path) -> tuple[Path, Path]:
    """Writes the training pairs without a style, and some of that style to evaluate on."""
    rows, parts = datasets.Dataset.from_parquet(str(TRAIN_PAIRS)), ([], [])
    for index, style in enumerate(rows["style"]):
        parts[style == HELD_OUT].append(index)
    rest, held = parts
    paths = folder / "train.parquet", folder / "test.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    for path, indices in zip(paths, (rest, sorted(Random(0).sample(held, HELD_OUT_PAIRS))), strict=True):
        own = path.with_suffix(f".{os.getpid()}")  # another process may do the same, or read already
        rows.select(indices).to_parquet(own)
        own.replace(path)
    return paths
