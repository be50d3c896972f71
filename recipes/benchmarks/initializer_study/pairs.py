"""The embedded pairs that studies train and evaluate on, and those that they choose learning rates by."""

import os
from functools import cache
from pathlib import Path
from random import Random

import datasets

from clipmap_hf.demo import TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.training.arguments import DataArguments


HELD_OUT = "emojione"  # the style that learning rates are chosen on, and how many of its drawings
HELD_OUT_PAIRS = 1000


@cache
def embedded_data(folder: Path, validation: bool) -> DataArguments:
    """Training pairs, and others to evaluate on: of an unseen style, or in validation of a style that was held out."""
    train, test = _held_out(folder / "validation") if validation else (TRAIN_PAIRS, TEST_PAIRS)
    return DataArguments(
        str(train), eval_data=str(test), keyword_column=["keywords"], caption_sampling="random", crop_scale=[0.7, 1.0]
    )


def _held_out(folder: Path) -> tuple[Path, Path]:
    """The training pairs without one style, and some of that style to evaluate on."""
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
