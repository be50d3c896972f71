"""What recipes/ternarize.py runs: ternary weights from a model and arguments to a written, packed folder."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import CLIPProcessor, PreTrainedModel
from transformers.utils import logging

from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.distillation import distill
from clipmap_hf.models import check_float
from clipmap_hf.teachers import Teacher
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.ternary.stage import TernaryStage
from clipmap_hf.training.arguments import DataArguments, RunArguments, TeacherCacheArguments
from clipmap_hf.training.optimization import step_count, steps_or_share
from clipmap_hf.training.setup import training_pairs
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_ternarization"]

logger = logging.get_logger(__name__)


def run_ternarization(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: CLIPProcessor,
    arguments: TernaryArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    cache: TeacherCacheArguments | None = None,
    recipe: str | None = None,
    pairs: PairDataset | PairStream | None = None,
) -> TrainResult:
    """
    Trains ternary weights of a model against its float teachers, and writes it, packed, to `run.output_dir`. With no
    steps, weights are rounded as they are, which leaves little of most models.

    Args:
        student: Trained in place: a copy of the teacher, or a smaller model.
        teachers: Frozen; the targets of several are averaged.
        processor: Tokenizer and image processor of the student.
        arguments: The stage's numbers, and what is ternary.
        run: Where and how to run.
        data: Training and evaluation pairs.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student, the ramp is longer than
            the training, or the student's weights are packed.
    """
    check_float(student, "Training")
    pairs = training_pairs(data) if pairs is None else pairs
    steps = step_count(arguments, pairs)
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
        run,
        data,
        cache=cache,
        recipe=recipe,
        pairs=pairs,
        make_stage=partial(
            TernaryStage,
            config=arguments.config(),
            ramp_steps=ramp_steps,
        ),
        export=lambda stage: stage.packed(getattr(torch, arguments.float_dtype)),
        said={
            "method": "Its weights are -1, 0 or 1 times a level, trained as such to give the teacher's embeddings.",
            "packed": True,
        },
    )
