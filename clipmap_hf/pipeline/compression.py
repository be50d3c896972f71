"""Compression from end to end: started or selected from a larger model, mapped if asked for, distilled; in steps."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from clipmap_hf.config import Budget, ClipMapConfig, requested_config
from clipmap_hf.config.json_values import json_values
from clipmap_hf.costs.cost import CostReport, model_cost, vision_cost
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.distributed import join_processes
from clipmap_hf.models.loading import load_model
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.arguments import DistillationArguments
from clipmap_hf.pipeline.context import GivenTeacher, RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.labels import LabelTrainer, arguments_for_labels, load_label_student, student_for_labels
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.pipeline.masking import MaskingTrainer
from clipmap_hf.pipeline.record import made_by, mark_as_made
from clipmap_hf.pipeline.start import (
    choose_student,
    remove_start,
    start_compressor,
    start_origin,
    start_student,
    teacher_of,
)
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, MaskingStageArguments
from clipmap_hf.training.result import TrainResult


__all__ = ["CompressionArguments", "compress", "compress_in_run", "compress_in_steps"]


@dataclass
class CompressionArguments:
    """
    The stages of a compression.

    Args:
        calibration: The pairs to start from.
        masking: If it has steps or epochs, masks select the student.
        mapping: If it has steps or epochs, operators are trained.
        distillation: The stage that all students end with.
    """

    calibration: CalibrationArguments = field(default_factory=CalibrationArguments)
    masking: MaskingStageArguments = field(default_factory=lambda: MaskingStageArguments(max_steps=0))
    mapping: MappingStageArguments = field(default_factory=lambda: MappingStageArguments(max_steps=0))
    distillation: DistillationStageArguments = field(default_factory=DistillationStageArguments)


def compress(
    teacher: GivenTeacher | Sequence[GivenTeacher],
    student: str | Budget | Mapping[str, Any] | ClipMapConfig,
    args: DistillationArguments,
    train_dataset: PairSource,
    eval_dataset: PairSource | None = None,
    *,
    initializer: str | None = None,
    calibration_data: PairSource | None = None,
    calibration_pairs: int = 2048,
    masking: MaskingStageArguments | None = None,
    mapping: MappingStageArguments | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    transform: Callable[[Any], Any] | None = None,
    text_dataset: Sequence[str] = (),
    labels: str | Sequence[str] | None = None,
) -> TrainResult:
    """
    All of it: makes a smaller model of a teacher, maps it if asked, distills it, evaluates it, and writes it with a
    card to `output_dir`. Called again with the same arguments, it goes on where it was interrupted.

    ```python
    result = compress("openai/clip-vit-base-patch16", "small", DistillationArguments("small"), pairs)
    result.model  # an ordinary CLIPModel, which lies in small/ too
    ```

    Args:
        teacher: Hub id or folder of a `CLIPModel`, or the model itself. Of several, the first is made smaller, and all
            together teach.
        student: A key of `PRESETS`, a `Budget` or its values by name, or a `ClipMapConfig`.
        args: The arguments of the run, of its data and of distillation.
        train_dataset: Pairs: a `datasets.Dataset` or `IterableDataset`, a list of `(image, text)`, a path or a Hub id;
            or images alone, in the same forms.
        eval_dataset: Pairs to measure retrieval on, in the same forms; or images alone, if training reads no captions.
        initializer: How the operators start, if `student` does not say it; `calibrated` by default.
        calibration_data: Pairs that the start reads, in the same forms; by default some of the training pairs.
        calibration_pairs: How many.
        masking: If given, learned masks select the student (TinyCLIP's automatic inheritance).
        mapping: If given, operators are trained before distillation (CLIP-Map).
        callbacks: Callbacks of transformers, for all stages.
        transform: Makes training images in place of the built-in augmentation, as `SeededTransform` takes it.
        text_dataset: Texts to train beside the images, which need not belong to them; `train_texts` names others.
        labels: A fixed list of texts to make the student for, as `load_labels` takes it: a list, or a source such as
            `labels.txt`. Only a vision tower is then trained and written, as by `LabelTrainer`; images need no
            captions.

    Raises:
        TypeError: If pairs or a teacher are given in another form.
        ValueError: If `student` is unknown, does not fit the teacher or is a budget that no shape meets; if masks are
            asked for with what selects or maps by itself; or as in `DistillationTrainer`.
    """
    args = args if labels is None else arguments_for_labels(args)
    options = {"callbacks": callbacks, "transform": transform, "text_dataset": text_dataset, "labels": labels}
    context = RunContext.of(args, train_dataset, eval_dataset, **options)
    teachers = [taken.source for taken in context.given_teachers(teacher)]
    config = requested_config(student, initializer)
    stages = {"masking": masking, "mapping": mapping}
    given = {name: stage.for_texts(context.data.paired) for name, stage in stages.items() if stage is not None}
    calibration = CalibrationArguments(calibration_data, calibration_pairs)
    stages = CompressionArguments(calibration, distillation=args, **given)
    return compress_in_run(teachers[0], teachers, config, context, stages)


def compress_in_run(
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
        ValueError: If masks are asked for without `student`, or with what selects or maps by itself; if labels are
            given with masks, mapping, or what `student_for_labels` refuses.
    """
    _check_stages(student, context, arguments)
    teacher = teacher_of(source, student, context)
    if source == teachers[0]:  # what was loaded is the commit that it was at, or the teacher of a map
        teachers = [teacher.source, *teachers[1:]]
    if context.labels is not None:
        student = student_for_labels(teacher, student)
    context = context.with_origin(_origin(source, student, context, arguments))
    if made_by(context, arguments.distillation):
        load = load_model if context.labels is None else load_label_student
        model = load(str(context.output_dir))
    else:
        model = _smaller_model(source, teachers, student, context, arguments)
    trainer_class = DistillationTrainer if context.labels is None else LabelTrainer
    trainer = trainer_class(
        model, teachers, arguments.distillation, processing_class=teacher.processor, context=context
    )
    result = trainer.train()
    mark_as_made(context)
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
        step, cache = str(index + 1), context.cache
        is_last = index == len(students) - 1
        own = context.inside("." if is_last else step, seed=context.run.seed + index)
        join_processes().print(f"Step {step} of {len(students)}, to {own.output_dir}")
        folder = cache.teacher_cache and str(Path(cache.teacher_cache) / step)
        own = dataclasses.replace(own, cache=dataclasses.replace(cache, teacher_cache=folder))
        result = compress_in_run(source, teachers, student, own, arguments)
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
    if arguments.masking.trains:
        return _selected(source, teachers, student, context, arguments.masking)
    if arguments.mapping.trains:
        compressor = start_compressor(source, student, context, arguments.calibration)
        join_processes().print(compressor.cost())
        MappingTrainer(compressor, arguments.mapping, context=context.inside("mapped")).train()
        return compressor.export()
    model = start_student(source, student, context, arguments.calibration)
    whole = teacher_of(source, student, context).model.config
    if context.labels is None:
        report = CostReport.of(whole, model.config)
    else:
        report = CostReport(teacher=model_cost(whole), student=vision_cost(model.config))
    join_processes().print(report)
    return model


def _selected(
    source: ModelId,
    teachers: Sequence[ModelId],
    student: ClipMapConfig,
    context: RunContext,
    masking: MaskingStageArguments,
) -> PreTrainedModel:
    student = choose_student(source, student, context, calibration=None)  # masks ask for no calibration pairs
    masked = context.inside("masked")
    MaskingTrainer(context.teacher(source), context.teachers(teachers), student, masking, masked).train()
    join_processes().wait_for_everyone()  # until the folder is written
    return load_model(str(masked.output_dir))


def _origin(
    source: ModelId, student: ClipMapConfig | None, context: RunContext, arguments: CompressionArguments
) -> dict[str, Any]:
    """All that decides what is distilled."""
    is_masked = arguments.masking.trains
    origin = start_origin(source, student, context, None if is_masked else arguments.calibration)
    for name in ("masking", "mapping"):
        if (stage := getattr(arguments, name)).trains:
            origin[name] = json_values(stage)
    return origin if context.labels is None else origin | {"labels": context.labels.texts.digest}


def _check_stages(student: ClipMapConfig | None, context: RunContext, arguments: CompressionArguments) -> None:
    if context.labels is not None and (arguments.masking.trains or arguments.mapping.trains):
        raise ValueError(
            "A student for labels is distilled alone; leave out the steps and epochs of masks and mapping."
        )
    if not arguments.masking.trains:
        return
    if student is None:
        raise ValueError("Masks need to know what to select: a preset, or sizes such as vision_hidden_size.")
    if student.initializer is not None or arguments.mapping.trains:
        raise ValueError(
            f"Masks select by themselves: with masking steps, leave out initializer={student.initializer!r} and the "
            "mapping's steps and epochs."
        )


def _remove_intermediates(context: RunContext) -> None:
    """Removes what only an interrupted run needs."""
    remove_start(context)
    if join_processes().is_main_process:
        for folder in ("mapped", "masked"):
            shutil.rmtree(context.output_dir / folder / "checkpoints", ignore_errors=True)
