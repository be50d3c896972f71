"""From a recipe's arguments to what they name: the student's config, pairs, collators, evaluation, a trained stage."""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from clipmap_hf.config import PRESETS, ClipMapConfig, TowerConfig
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import PairDataset, load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.training.arguments import DataArguments, RunArguments, StageArguments, StudentArguments
from clipmap_hf.training.stages import Stage
from clipmap_hf.training.trainer import Trainer, TrainResult


__all__ = [
    "evaluation_batches",
    "evaluation_function",
    "map_config",
    "run_stage",
    "training_collator",
    "training_pairs",
]


def map_config(arguments: StudentArguments, seed: int = 0) -> ClipMapConfig | None:
    """
    The preset that the arguments name, with their sizes and options put over it; `None` if they say nothing.

    Args:
        arguments: What was given.
        seed: Of random initializers.

    Raises:
        ValueError: If the preset is unknown.
    """
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}
    if not given:
        return None
    preset = given.pop("student", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"student={preset!r} is unknown; the presets are {sorted(PRESETS)}.")
    config = ClipMapConfig() if preset is None else PRESETS[preset]
    for tower in ("vision", "text"):
        sizes = {f.name: given.pop(f"{tower}_{f.name}", None) for f in dataclasses.fields(TowerConfig)}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        given[tower] = dataclasses.replace(getattr(config, tower), **sizes)
    return dataclasses.replace(config, seed=seed, **given)


def training_pairs(data: DataArguments) -> PairDataset:
    """The training pairs that `data` names."""
    pairs = load_pairs(
        data.train_data,
        split=data.train_split,
        image_column=data.image_column,
        caption_columns=[*data.caption_column, *data.keyword_column],
    )
    return PairDataset(pairs)


def training_collator(data: DataArguments, processor, seed: int) -> PairCollator:
    """A collator that augments; `processor` is a `CLIPProcessor`."""
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
    """The pairs of `data.eval_data`, preprocessed, with all captions of the first column; `None` if there are none."""
    if data.eval_data is None:
        return None
    pairs = load_pairs(
        data.eval_data,
        split=data.eval_split,
        image_column=data.image_column,
        caption_columns=data.caption_column[:1],
    )
    collator = PairCollator(processor.tokenizer, processor.image_processor, data.caption_column[:1])
    return DataLoader(PairDataset(pairs), batch_size, collate_fn=collator, num_workers=num_workers)


def evaluation_function(
    data: DataArguments, processor, run: RunArguments
) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """Retrieval on `data.eval_data` as a function of the model, for the loop; `None` without evaluation data."""
    batches = evaluation_batches(data, processor, num_workers=run.num_workers)
    return None if batches is None else lambda model: evaluate_retrieval(model, batches)


def run_stage(
    stage: Stage,
    arguments: StageArguments,
    run: RunArguments,
    data: DataArguments,
    processor,
    *,
    name: str,
    pairs: PairDataset | None = None,
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    save: Callable[[Path, dict[str, float]], None] | None = None,
) -> TrainResult:
    """
    Trains a stage on `data`; arguments as in `Trainer`.

    The stage's own seed is derived from `run.seed` and `name`: with one seed for all, a second stage would see the
    first one's batches and crops again.
    """
    run = dataclasses.replace(run, seed=zlib.crc32(f"{name}-{run.seed}".encode()))
    return Trainer(
        stage,
        arguments,
        run,
        training_pairs(data) if pairs is None else pairs,
        training_collator(data, processor, run.seed),
        evaluate,
        save,
        data.max_bad_fraction,
        name,
    ).train()
