"""The masking stage (TinyCLIP's automatic inheritance): from models and arguments to a written, selected student."""

import copy
from collections.abc import Sequence
from pathlib import Path

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.costs.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.models.loading import check_float
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import freeze_tower
from clipmap_hf.pipeline.stage import evaluation_function, evaluation_results, run_stage
from clipmap_hf.training.arguments import MaskingArguments
from clipmap_hf.training.optimization import step_count, steps_or_share
from clipmap_hf.training.stages.masking import MaskingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_masking"]


def run_masking(
    source: Teacher,
    teachers: Sequence[Teacher],
    student: ClipMapConfig,
    arguments: MaskingArguments,
    context: RunContext,
) -> TrainResult:
    """
    Learns masks of a copy of a model and writes the student that they select, to be distilled, to the output folder.

    Args:
        source: What to select from; mostly the first teacher.
        teachers: Frozen; the targets of several are averaged.
        student: The shape to select.
        arguments: The stage's numbers.
        context: The run.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the source, or the source's weights
            are packed.
    """
    check_float(source.model, "Masking")
    check_same_preprocessing(source.processor, teachers)
    ramp = steps_or_share(arguments.ramp_steps, step_count(arguments, context.pairs))
    stage = MaskingStage(
        freeze_tower(copy.deepcopy(source.model), arguments.freeze),
        student=student,
        ramp_steps=max(1, round(ramp)),
        teachers=[teacher.model for teacher in teachers],
        losses=arguments.losses,
        logit_scale=arguments.logit_scale,
        learn_logit_scale=arguments.learn_logit_scale,
    )

    def save(folder: Path, metrics: dict[str, float]) -> None:
        model, results = stage.student(), evaluation_results(context.data, metrics)
        costs = CostReport(teacher=model_cost(source.model.config), student=model_cost(model.config))
        card = render_card(
            source.id,
            str(costs),
            model_class=type(model).__name__,
            method="Its weights were selected from the teacher's by learned masks (TinyCLIP), and trained with them.",
            revision=source.revision,
            results=results,
            recipe=context.recipe,
        )
        write_student_folder(folder, model, source.processor, card, results)

    return run_stage(
        stage,
        arguments,
        context,
        source.processor,
        name="masking",
        evaluate=evaluation_function(context, source.processor),
        save=save,
        config={
            "source": [source.id, source.revision],
            "teachers": [[teacher.id, teacher.revision] for teacher in teachers],
            "student": student.to_dict(),
        },
    )
