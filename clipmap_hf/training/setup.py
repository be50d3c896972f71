"""From a recipe's arguments to what they name: the student's config, pairs, collators, evaluation, a trained stage."""

import dataclasses
import glob
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import PretrainedConfig

from clipmap_hf.budget import Budget
from clipmap_hf.config import PRESETS, ClipMapConfig, TowerConfig
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.teacher_cache import TeacherCache
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.training.arguments import DataArguments, RunArguments, StageArguments, StudentArguments
from clipmap_hf.training.stages import Stage
from clipmap_hf.training.trainer import Trainer, TrainResult


__all__ = [
    "config_values",
    "evaluation_batches",
    "evaluation_function",
    "map_config",
    "run_stage",
    "sized",
    "source_files",
    "stage_seed",
    "training_collator",
    "training_pairs",
]

# What may change between a run and its resumption.
_INDIFFERENT = {"eval_data", "eval_split", "image_backend", "max_bad_fraction"}
_PROVENANCE = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "architectures"}


def map_config(arguments: StudentArguments, seed: int = 0) -> ClipMapConfig | None:
    """
    The preset or the budget that the arguments name, with their sizes and options; `None` if they say nothing.

    Args:
        arguments: What was given.
        seed: Of random initializers.

    Raises:
        ValueError: If the preset is unknown, or the budget none.
    """
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}
    if not given:
        return None
    preset = given.pop("student", None)
    if isinstance(preset, dict):
        preset, given["budget"] = None, preset
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"student={preset!r} is unknown; the presets are {sorted(PRESETS)}.")
    config = ClipMapConfig() if preset is None else PRESETS[preset]
    for tower in ("vision", "text"):
        sizes = {f.name: given.pop(f"{tower}_{f.name}", None) for f in dataclasses.fields(TowerConfig)}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        given[tower] = dataclasses.replace(getattr(config, tower), **sizes)
    return dataclasses.replace(config, seed=seed, **given)


def sized(arguments: StudentArguments, size: str) -> StudentArguments:
    """
    Arguments with another size.

    Args:
        arguments: What all sizes have in common.
        size: A preset, or `option=value,option=value` with the options of `StudentArguments` or the measures of a
            `Budget`.

    Raises:
        ValueError: If there is no such option, or it has no value.
    """
    if "=" not in size:
        return dataclasses.replace(arguments, student=size)
    options, measures = ([f.name for f in dataclasses.fields(one)] for one in (arguments, Budget))
    values, budget = {}, {}
    for word in size.split(","):
        name, _, value = word.partition("=")
        if name not in (*options, *measures) or not value:
            allowed = [*options, *measures]
            raise ValueError(f"The size {size!r} has {word!r}; it takes option=value, with an option of {allowed}.")
        (values if name in options else budget)[name] = yaml.safe_load(value)
    if budget and "student" in values:
        raise ValueError(f"The size {size!r} has a preset and a budget; give one of them.")
    return dataclasses.replace(arguments, **values, **({"student": budget} if budget else {}))


def training_pairs(data: DataArguments) -> PairDataset | PairStream:
    """The training pairs that `data` names."""
    pairs = load_pairs(
        data.train_data,
        split=data.train_split,
        image_column=data.image_column,
        caption_columns=[*data.caption_column, *data.keyword_column],
        streaming=data.streaming,
    )
    return PairStream(pairs, data.shuffle_buffer) if data.streaming else PairDataset(pairs)


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
    """
    The pairs of `data.eval_data`, preprocessed, with all captions of the first column; of several processes, each has
    its share of them. `None` if there is no evaluation data.

    Raises:
        ValueError: If there are fewer pairs than processes.
    """
    if data.eval_data is None:
        return None
    return evaluation_pairs(
        data.eval_data,
        processor,
        split=data.eval_split,
        image_column=data.image_column,
        caption_column=data.caption_column[0],
        batch_size=batch_size,
        num_workers=num_workers,
    )


def evaluation_function(
    data: DataArguments, processor, run: RunArguments
) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """Retrieval on `data.eval_data` as a function of the model, for the loop; `None` without evaluation data."""
    batches = evaluation_batches(data, processor, num_workers=run.num_workers)
    return None if batches is None else lambda model: evaluate_retrieval(model, batches)


def source_files(data: DataArguments) -> dict[str, Any]:
    """What tells one set of training pairs from another: names and sizes of its files, or its id, and its columns."""
    path = Path(data.train_data)
    found = sorted(path.rglob("*") if path.is_dir() else map(Path, glob.glob(data.train_data, recursive=True)))
    return {
        "files": {one.name: one.stat().st_size for one in found if one.is_file()} or data.train_data,
        "split": data.train_split,
        "image_column": data.image_column,
    }


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """What of a model's config decides what is trained: not where it was loaded from, nor by which version."""
    values = config.to_dict()
    towers = {name: values.pop(name) for name in ("vision_config", "text_config")}
    nested = {f"{tower}.{name}": value for tower, inner in towers.items() for name, value in inner.items()}
    return {name: value for name, value in {**values, **nested}.items() if name.split(".")[-1] not in _PROVENANCE}


def stage_seed(name: str, seed: int) -> int:
    """A stage's own seed: with one for all, a second stage would see the first one's batches and crops again."""
    return zlib.crc32(f"{name}-{seed}".encode())


def run_stage(
    stage: Stage,
    arguments: StageArguments,
    run: RunArguments,
    data: DataArguments,
    processor,
    *,
    name: str,
    pairs: PairDataset | PairStream | None = None,
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    save: Callable[[Path, dict[str, float]], None] | None = None,
    config: dict[str, Any] | None = None,
    teacher_cache: TeacherCache | None = None,
    recipe: str | None = None,
) -> TrainResult:
    """
    Trains a stage on `data`, with the `stage_seed` of its name and `run.seed`; arguments as in `Trainer`. With a
    `teacher_cache`, training goes through the views that it holds.
    """
    run = dataclasses.replace(run, seed=stage_seed(name, run.seed))
    collator = training_collator(data, processor, run.seed)
    if teacher_cache is not None:
        collator.teacher_cache, collator.views = teacher_cache, teacher_cache.views
    decisive = {key: value for key, value in dataclasses.asdict(data).items() if key not in _INDIFFERENT}
    return Trainer(
        stage,
        arguments,
        run,
        training_pairs(data) if pairs is None else pairs,
        collator,
        evaluate,
        save,
        data.max_bad_fraction,
        name,
        {**decisive, "views": collator.views, **(config or {})},
        recipe,
    ).train()
