"""Compression from end to end: started or selected from a larger model, mapped if asked for, distilled; in steps."""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.costs.cost import CostReport, model_cost
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.distributed import join_processes
from clipmap_hf.models.loading import load_model
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import run_distillation
from clipmap_hf.pipeline.mapping import run_mapping
from clipmap_hf.pipeline.masking import run_masking
from clipmap_hf.pipeline.record import made_by, mark_as_made
from clipmap_hf.pipeline.start import (
    choose_student,
    remove_start,
    start_compressor,
    start_origin,
    start_student,
    teacher_of,
)
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationArguments, MappingArguments, MaskingArguments, StageArguments
from clipmap_hf.training.trainer import TrainResult


__all__ = ["CompressionArguments", "compress", "compress_in_steps"]


@dataclass
class CompressionArguments:
    """
    The stages of a compression.

    Args:
        calibration: The pairs to start from.
        masking: If it has steps or epochs, masks select the student.
        mapping: If it has steps or epochs, operators are trained.
        distillation: The stage that all students end with.
        cache: Where to keep the teachers' embeddings.
    """

    calibration: CalibrationArguments = field(default_factory=CalibrationArguments)
    masking: MaskingArguments = field(default_factory=lambda: MaskingArguments(steps=0))
    mapping: MappingArguments = field(default_factory=lambda: MappingArguments(steps=0))
    distillation: DistillationArguments = field(default_factory=DistillationArguments)
    cache: TeacherCacheArguments = field(default_factory=TeacherCacheArguments)


def compress(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig | None,
    context: RunContext,
    arguments: CompressionArguments,
) -> TrainResult:
    """
    Makes a smaller model of `source` and distills it. The result lies in the output folder, with its card and logs;
    the student that was mapped or selected by masks lies in `mapped/` or `masked/` there. What only an interrupted run
    needs is removed at the end: `start/`, and the checkpoints in `mapped/` or `masked/`.

    Args:
        source: What to compress; or, without `student`, a folder with a map to go on with, which knows its teacher.
        teachers: Whom the stages learn from; when a map is gone on with, the map's teacher takes the first place.
        student: The size to make, and how its operators start.
        context: The run.
        arguments: Its stages.

    Raises:
        ValueError: If masks are asked for without `student`, or with what selects or maps by itself.
    """
    _check_masking(student, arguments)
    teacher = teacher_of(source, student, context)
    if source == teachers[0]:  # what was loaded is the commit that it was at, or the teacher of a map
        teachers = [teacher.source, *teachers[1:]]
    origin = _origin(source, student, context, arguments)
    if made_by(context, origin, arguments.distillation):
        model = load_model(str(context.output_dir))
    else:
        model = _smaller_model(source, teachers, student, context, arguments)
    result = run_distillation(
        model,
        context.teachers(teachers),
        teacher.processor,
        arguments.distillation,
        context,
        cache=arguments.cache,
        origin=origin,
    )
    mark_as_made(context, origin)
    _remove_intermediates(context)
    return result


def compress_in_steps(
    source: ModelId,
    teachers: Sequence[ModelId],
    students: Sequence[ClipMapConfig],
    context: RunContext,
    arguments: CompressionArguments,
) -> TrainResult:
    """
    Makes smaller and smaller models, each from the model before, all with the same teachers. What steps leave lies in
    `1/`, `2/`, … inside the output folder, the last of it in that folder itself, the teacher cache alike. Each step
    has a seed of its own.

    Args:
        source: What to compress first.
        teachers: Whom all steps learn from.
        students: The sizes to go through, each cut from the model before.
        context: The run.
        arguments: The stages of every step.
    """
    for index, student in enumerate(students):
        step, cache = str(index + 1), arguments.cache
        is_last = index == len(students) - 1
        own = context.inside("." if is_last else step, seed=context.run.seed + index)
        join_processes().print(f"Step {step} of {len(students)}, to {own.output_dir}")
        folder = cache.teacher_cache and str(Path(cache.teacher_cache) / step)
        own_arguments = dataclasses.replace(arguments, cache=dataclasses.replace(cache, teacher_cache=folder))
        result = compress(source, teachers, student, own, own_arguments)
        source = ModelId(str(own.output_dir))
    return result


def _smaller_model(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig | None,
    context: RunContext,
    arguments: CompressionArguments,
) -> PreTrainedModel:
    """The student before it is distilled: selected by masks, mapped, or just started."""
    if _is_asked_for(arguments.masking):
        return _selected(source, teachers, student, context, arguments.masking)
    if _is_asked_for(arguments.mapping):
        compressor = start_compressor(source, student, context, arguments.calibration)
        join_processes().print(compressor.cost())
        run_mapping(compressor, arguments.mapping, context.inside("mapped"))
        return compressor.export()
    model = start_student(source, student, context, arguments.calibration)
    whole = teacher_of(source, student, context).model.config
    join_processes().print(CostReport(teacher=model_cost(whole), student=model_cost(model.config)))
    return model


def _selected(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig,
    context: RunContext,
    masking: MaskingArguments,
) -> PreTrainedModel:
    student = choose_student(source, student, context, calibration=None)  # masks ask for no calibration pairs
    masked = context.inside("masked")
    run_masking(context.teacher(source), context.teachers(teachers), student, masking, masked)
    join_processes().wait_for_everyone()  # until the folder is written
    return load_model(str(masked.output_dir))


def _origin(
    source: ModelId, student: ClipMapConfig | None, context: RunContext, arguments: CompressionArguments
) -> dict[str, Any]:
    """All that decides what is distilled."""
    is_masked = _is_asked_for(arguments.masking)
    origin = start_origin(source, student, context, None if is_masked else arguments.calibration)
    for name in ("masking", "mapping"):
        if _is_asked_for(stage := getattr(arguments, name)):
            origin[name] = dataclasses.asdict(stage)
    return origin


def _check_masking(student: ClipMapConfig | None, arguments: CompressionArguments) -> None:
    if not _is_asked_for(arguments.masking):
        return
    if student is None:
        raise ValueError("Masks need to know what to select: a preset, or sizes such as vision_hidden_size.")
    if student.initializer is not None or _is_asked_for(arguments.mapping):
        raise ValueError(
            f"Masks select by themselves: with masking steps, leave out initializer={student.initializer!r} and the "
            "mapping's steps and epochs."
        )


def _is_asked_for(stage: StageArguments) -> bool:
    return bool(stage.epochs if stage.steps is None else stage.steps)


def _remove_intermediates(context: RunContext) -> None:
    """Removes what only an interrupted run needs."""
    remove_start(context)
    if join_processes().is_main_process:
        for folder in ("mapped", "masked"):
            shutil.rmtree(context.output_dir / folder / "checkpoints", ignore_errors=True)
