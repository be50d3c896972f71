"""Ternary weights: from a model and arguments to a written, packed folder."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from clipmap_hf.models.loading import check_float
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import distill
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.optimization import step_count, steps_or_share
from clipmap_hf.training.stages.ternary import TernaryStage
from clipmap_hf.training.ternary_arguments import TernaryArguments
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_ternarization"]

logger = logging.get_logger(__name__)


def run_ternarization(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: ProcessorMixin,
    arguments: TernaryArguments,
    context: RunContext,
    *,
    cache: TeacherCacheArguments | None = None,
) -> TrainResult:
    """
    Trains ternary weights of a model against its float teachers, and writes it, packed, to the output folder. With no
    steps, weights are rounded as they are, which leaves little of most models.

    Args:
        student: Trained in place: a copy of the teacher, or a smaller model.
        teachers: Frozen; the targets of several are averaged.
        processor: Tokenizer and image processor of the student.
        arguments: The stage's numbers, and what is ternary.
        context: The run.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student, the ramp is longer than
            the training, or the student's weights are packed.
    """
    check_float(student, "Training")
    steps = step_count(arguments, context.pairs)
    ramp_steps = round(steps_or_share(arguments.ramp_steps, steps))
    if ramp_steps > steps:
        raise ValueError(f"ramp_steps={ramp_steps} are more than the {steps} of the training; a share is below 1.")
    if not steps:
        logger.warning("Weights are made ternary without training, which leaves little of most models; give steps.")
    return distill(
        student,
        teachers,
        processor,
        arguments,
        context,
        cache=cache,
        make_stage=partial(
            TernaryStage,
            config=arguments.config(),
            ramp_steps=ramp_steps,
            float_dtype=getattr(torch, arguments.float_dtype),
        ),
        card={
            "method": "Its weights are -1, 0 or 1 times a level, trained as such to give the teacher's embeddings.",
            "packed": True,
        },
    )
