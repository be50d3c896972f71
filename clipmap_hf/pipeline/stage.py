"""Runs a training stage on the data of a run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import evaluation_batches, stage_seed, training_collator
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.hub.card import hub_dataset
from clipmap_hf.hub.results import SetResults
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.trainer import Trainer, TrainResult


__all__ = ["Evaluate", "evaluation_function", "evaluation_results", "run_stage"]

Evaluate = Callable[[torch.nn.Module], dict[str, float]]

# What may change between a run and its resumption.
_MAY_CHANGE = {"eval_data", "eval_split", "image_backend", "max_bad_fraction"}


def run_stage(
    stage: Stage,
    arguments: StageArguments,
    context: RunContext,
    processor: ProcessorMixin,
    *,
    name: str,
    evaluate: Evaluate | None = None,
    save: Callable[[Path, dict[str, float]], None] | None = None,
    config: Mapping[str, Any] | None = None,
    teacher_cache: TeacherCache | None = None,
) -> TrainResult:
    """
    Trains a stage on the pairs of a run.

    Args:
        stage: What to train.
        arguments: The stage's numbers.
        context: The run.
        processor: Tokenizer and image processor of the student.
        name: Names the stage in logs, and decides its seed together with the run's (`stage_seed`).
        evaluate: As in `Trainer`.
        save: As in `Trainer`.
        config: What decides the result beside arguments and data, as JSON values.
        teacher_cache: Training goes through the views that it holds.
    """
    run = dataclasses.replace(context.run, seed=stage_seed(name, context.run.seed))
    collator = training_collator(context.data, processor, run.seed)
    if teacher_cache is not None:
        collator.teacher_cache, collator.views = teacher_cache, teacher_cache.views
    decisive = {key: value for key, value in dataclasses.asdict(context.data).items() if key not in _MAY_CHANGE}
    return Trainer(
        stage=stage,
        arguments=arguments,
        run=run,
        pairs=context.pairs,
        collator=collator,
        evaluate=evaluate,
        save=save,
        max_bad_fraction=context.data.max_bad_fraction,
        name=name,
        config={**decisive, "views": collator.views, **(config or {})},
        recipe=context.recipe,
    ).train()


def evaluation_function(context: RunContext, processor: ProcessorMixin) -> Evaluate | None:
    """Retrieval on the evaluation pairs as a function of the model; `None` without evaluation data."""
    batches = evaluation_batches(context.data, processor, num_workers=context.run.num_workers)
    return None if batches is None else lambda model: evaluate_retrieval(model, batches)


def evaluation_results(
    data: DataArguments, student: Mapping[str, float], teacher: Mapping[str, float] | None = None
) -> list[SetResults]:
    """What an evaluation on a run's data gave a student, and perhaps its teacher; empty if there was none."""
    if not student:
        return []
    source, split = data.evaluated
    dataset_id = hub_dataset(source)
    name = dataset_id or Path(source).name
    if data.validation_fraction:
        name += f" ({data.validation_fraction:g} of it, held out)"
    return [SetResults(name, student, teacher, dataset_id, split=split)]
