"""Distillation of a student, whatever of it is trained: from models and arguments to a written student folder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from clipmap_hf.costs.cost import CostReport, model_cost, with_bytes_of
from clipmap_hf.distributed import join_processes
from clipmap_hf.families import family_for
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.models.fingerprints import config_values
from clipmap_hf.models.loading import check_float
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.stage import evaluation_function, evaluation_results, run_stage
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.make import make_teacher_cache
from clipmap_hf.training.arguments import DistillationArguments
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["distill", "freeze_tower", "run_distillation"]


def run_distillation(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: ProcessorMixin,
    arguments: DistillationArguments,
    context: RunContext,
    *,
    cache: TeacherCacheArguments | None = None,
    origin: Mapping[str, Any] | None = None,
) -> TrainResult:
    """
    Distills a student and writes it, with a card that shows its results beside the first teacher's, to the output
    folder.

    Args:
        student: Trained in place.
        teachers: Frozen; the targets of several are averaged.
        processor: Tokenizer and image processor of the student.
        arguments: The stage's numbers.
        context: The run.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.
        origin: All that decides how the student starts, as JSON values; a checkpoint of another origin is refused.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student, or the student's weights
            are packed.
    """
    check_float(student, "Training")
    names = [Path(teacher.id).name if Path(teacher.id).is_dir() else teacher.id for teacher in teachers[1:]]
    named = " and ".join(["the teacher", *(f"`{name}`" for name in names)])  # a card has named the first already
    return distill(
        student,
        teachers,
        processor,
        arguments,
        context,
        cache=cache,
        origin=origin,
        card={"method": f"Its weights were distilled from {named} (losses: {', '.join(arguments.losses)})."},
    )


def distill(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: ProcessorMixin,
    arguments: DistillationArguments,
    context: RunContext,
    *,
    card: Mapping[str, Any],
    make_stage: Callable[..., DistillationStage] = DistillationStage,
    cache: TeacherCacheArguments | None = None,
    origin: Mapping[str, Any] | None = None,
) -> TrainResult:
    """
    As `run_distillation`, by any stage that distills.

    Args:
        student: Trained in place.
        teachers: Frozen; the targets of several are averaged.
        processor: Tokenizer and image processor of the student.
        arguments: The stage's numbers.
        context: The run.
        card: What else `render_card` is told: `method`, and of a ternary model that it is `packed`.
        make_stage: `DistillationStage`, or what takes the same arguments. Whatever it is, its batches are those of the
            stage `distillation`, whose views a teacher cache holds.
        cache: Where to keep the teachers' embeddings.
        origin: As in `run_distillation`.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student.
    """
    check_same_preprocessing(processor, teachers)
    teacher_cache = _teacher_cache(teachers, processor, arguments, context, cache)
    is_cached = teacher_cache is not None
    evaluate = evaluation_function(context, processor)
    teacher_metrics = None if evaluate is None else evaluate(teachers[0].model.to(join_processes().device))
    if is_cached:  # the stage moves those that it uses
        for teacher in teachers:
            teacher.model.cpu()
    stage = make_stage(
        freeze_tower(student, arguments.freeze),
        teachers=[] if is_cached else [teacher.model for teacher in teachers],
        losses=arguments.losses,
        logit_scale=arguments.logit_scale,
        learn_logit_scale=arguments.learn_logit_scale,
        teacher_dims=teacher_cache.summary["dims"] if is_cached else (),
    )
    teacher_cost, student_cost = model_cost(teachers[0].model.config), model_cost(student.config)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        results, written = evaluation_results(context.data, metrics, teacher_metrics), stage.export()
        rendered = render_card(
            teachers[0].id,
            str(CostReport(teacher=teacher_cost, student=with_bytes_of(student_cost, written))),
            model_class=type(student).__name__,
            revision=teachers[0].revision,
            results=results,
            recipe=context.recipe,
            **card,
        )
        write_student_folder(folder, written, processor, rendered, results)

    result = run_stage(
        stage,
        arguments,
        context,
        processor,
        name="distillation",
        evaluate=evaluate,
        save=save,
        config={
            "teachers": [[teacher.id, teacher.revision] for teacher in teachers],
            "student": config_values(student.config),
            "origin": origin,
        },
        teacher_cache=teacher_cache,
    )
    return dataclasses.replace(result, teacher_metrics=teacher_metrics)


def freeze_tower(model: PreTrainedModel, tower: str | None) -> PreTrainedModel:
    """Lets all weights of a model be trained, but those of a tower and its projection; `None` freezes neither."""
    family = family_for(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower is None or family.match(name).tower != tower)
    return model


def _teacher_cache(
    teachers: Sequence[Teacher],
    processor: ProcessorMixin,
    arguments: DistillationArguments,
    context: RunContext,
    cache: TeacherCacheArguments | None,
) -> TeacherCache | None:
    """Makes or opens the teacher cache, if one is asked for."""
    if cache is None or cache.teacher_cache is None:
        return None
    if "hidden" in arguments.losses:
        raise ValueError("The hidden loss asks the teacher itself; leave out teacher_cache, or the loss.")
    numbers = {"seed": context.run.seed, "num_workers": context.run.num_workers}
    return make_teacher_cache(teachers, processor, context.data, cache, pairs=context.pairs, **numbers)
