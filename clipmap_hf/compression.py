"""Compression from end to end: started or selected from a larger model, mapped if asked for, distilled; in steps."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.distributed import join_processes
from clipmap_hf.models import load_model
from clipmap_hf.runs import run_distillation, run_mapping, run_masking
from clipmap_hf.starts import choose_student, start_compressor
from clipmap_hf.teachers import load_teachers
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.trainer import TrainResult


__all__ = ["compress", "compress_in_steps"]

ModelId = tuple[str, str | None]  # Hub id or folder, and its branch, tag or commit on the Hub


def compress(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig | None,
    run: RunArguments,
    data: DataArguments,
    *,
    calibration: CalibrationArguments,
    masking: MaskingArguments,
    mapping: MappingArguments,
    distillation: DistillationArguments,
    cache: TeacherCacheArguments | None = None,
    recipe: str | None = None,
) -> TrainResult:
    """
    Makes a smaller model of `source` and distills it. The result lies in `run.output_dir`; what was mapped or selected
    by masks lies in `mapped/` or `masked/` there.

    Args:
        source: What to compress; or, without `student`, a folder with a map to go on with, which knows its teacher.
        teachers: Whom the stages learn from; of one map gone on with, its teacher takes the first one's place.
        student: The size to make, and how its operators start.
        run: Where and how to run.
        data: Training and evaluation pairs.
        calibration: The pairs to start from.
        masking: If it has steps or epochs, masks select the student.
        mapping: If it has steps or epochs, operators are trained.
        distillation: The stage that all students end with.
        cache: Where to keep the teachers' embeddings.
        recipe: The resolved arguments as YAML, for cards and `arguments.yaml`.

    Raises:
        ValueError: If masks are asked for without `student`, or with what selects or maps by itself.
    """
    if _is_asked_for(masking):
        model, processor = _selected(source, teachers, student, masking, mapping, run, data, recipe)
    else:
        compressor = start_compressor(*source, student, calibration, run, data)
        join_processes().print(compressor.cost())
        run_mapping(compressor, mapping, _in_folder(run, "mapped"), data, recipe=recipe)
        model, processor = compressor.export(), compressor.processor
        if source == teachers[0]:  # what was loaded is the commit that it was at, or the teacher of a map
            teachers = [(compressor.teacher_id, compressor.teacher_revision), *teachers[1:]]
        del compressor  # the operators are on disk, and larger than both models
    return run_distillation(
        model,
        load_teachers(teachers, data.image_backend),
        processor,
        distillation,
        run,
        data,
        cache=cache,
        recipe=recipe,
    )


def compress_in_steps(
    source: ModelId,
    teachers: Sequence[ModelId],
    students: Sequence[ClipMapConfig],
    run: RunArguments,
    data: DataArguments,
    *,
    cache: TeacherCacheArguments,
    **arguments: Any,
) -> TrainResult:
    """
    Makes one smaller model of another, all with the same teachers. What steps leave lies in `1/`, `2/`, … inside
    `run.output_dir`, the last of it in that folder itself, the teacher cache alike. Each step has a seed of its own.

    Args:
        source: What to compress first.
        teachers: Whom all steps learn from.
        students: The sizes to go through, each cut from the one before.
        run: As in `compress`.
        data: As in `compress`.
        cache: As in `compress`.
        arguments: The others of `compress`.
    """
    for index, student in enumerate(students):
        step = str(index + 1)
        own_run = _in_folder(run, step) if index < len(students) - 1 else run
        join_processes().print(f"Step {step} of {len(students)}, to {own_run.output_dir}")
        result = compress(
            source,
            teachers,
            student,
            dataclasses.replace(own_run, seed=run.seed + index),
            data,
            cache=dataclasses.replace(
                cache, teacher_cache=cache.teacher_cache and str(Path(cache.teacher_cache) / step)
            ),
            **arguments,
        )
        source = (own_run.output_dir, None)
    return result


def _selected(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig | None,
    masking: MaskingArguments,
    mapping: MappingArguments,
    run: RunArguments,
    data: DataArguments,
    recipe: str | None,
) -> tuple[PreTrainedModel, CLIPProcessor]:
    if student is None:
        raise ValueError("Masks need to know what to select: a preset, or sizes such as vision_hidden_size.")
    if student.initializer is not None or _is_asked_for(mapping):
        raise ValueError(
            f"Masks select by themselves: with masking steps, leave out initializer={student.initializer!r} and the "
            "mapping's steps and epochs."
        )
    student = choose_student(*source, student, None, run, data)  # masks ask for no calibration pairs
    (selected_from,) = load_teachers([source], data.image_backend)
    masked = _in_folder(run, "masked")
    run_masking(
        selected_from, load_teachers(teachers, data.image_backend), student, masking, masked, data, recipe=recipe
    )
    join_processes().wait_for_everyone()  # until the folder is written
    return load_model(masked.output_dir), selected_from.processor


def _is_asked_for(stage: MaskingArguments | MappingArguments) -> bool:
    return bool(stage.epochs if stage.steps is None else stage.steps)


def _in_folder(run: RunArguments, name: str) -> RunArguments:
    return dataclasses.replace(run, output_dir=str(Path(run.output_dir) / name))
