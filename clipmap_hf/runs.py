"""What the recipes run: mapping, distillation and masking, from models and arguments to a written student folder."""

import copy
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.distillation import distill, evaluated, frozen
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.losses import PAIR_LOSSES
from clipmap_hf.models import check_float
from clipmap_hf.teachers import Teacher, check_same_preprocessing
from clipmap_hf.training.arguments import (
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.masking import MaskingStage
from clipmap_hf.training.optimization import step_count, steps_or_share
from clipmap_hf.training.setup import (
    evaluation_function,
    run_stage,
    training_pairs,
)
from clipmap_hf.training.stages import DistillationStage, MappingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_distillation", "run_mapping", "run_masking"]


def run_mapping(
    compressor: ClipMapCompressor,
    arguments: MappingArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    recipe: str | None = None,
    pairs: PairDataset | PairStream | None = None,
) -> TrainResult:
    """
    Trains a compressor's operators and writes the mapped student, with its map, to `run.output_dir`.

    Args:
        compressor: Trained in place.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.
        pairs: The training pairs, if they are loaded already.
    """
    teacher = (compressor.teacher_id, compressor.teacher_revision)
    distills = set(arguments.losses) - set(PAIR_LOSSES)
    teachers = [Teacher.load(*teacher, backend=data.image_backend).model] if distills else []
    numbers = (arguments.logit_scale, arguments.learn_logit_scale)
    stage = MappingStage(compressor.mapper, *numbers, teachers, arguments.losses)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        compressor.save_pretrained(folder, results=evaluated(data, metrics), recipe=recipe)

    processor = compressor.processor
    callbacks = {"evaluate": evaluation_function(data, processor, run), "save": save}
    config = {
        "teachers": [list(teacher)],
        "student": compressor.config.to_dict(),
    }
    return run_stage(
        stage, arguments, run, data, processor, name="mapping", pairs=pairs, config=config, recipe=recipe, **callbacks
    )


def run_distillation(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: CLIPProcessor,
    arguments: DistillationArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    cache: TeacherCacheArguments | None = None,
    recipe: str | None = None,
    pairs: PairDataset | PairStream | None = None,
) -> TrainResult:
    """
    Distills a student and writes it, with a card that shows its results beside the first teacher's, to
    `run.output_dir`.

    Args:
        student: Trained in place.
        teachers: Frozen; the targets of several are averaged.
        processor: Tokenizer and image processor of the student.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student, or the student's weights
            are packed.
    """
    check_float(student, "Training")
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
        make_stage=DistillationStage,
        export=lambda stage: stage.trained,
        said={
            "method": f"Its weights were distilled from {_names(teachers)} (losses: {', '.join(arguments.losses)})."
        },
    )


def _names(teachers: Sequence[Teacher]) -> str:
    """What a card calls them; the first has been named."""
    names = [Path(one.id).name if Path(one.id).is_dir() else one.id for one in teachers[1:]]
    return " and ".join(["the teacher", *(f"`{name}`" for name in names)])


def run_masking(
    source: Teacher,
    teachers: Sequence[Teacher],
    student: ClipMapConfig,
    arguments: MaskingArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    recipe: str | None = None,
) -> TrainResult:
    """
    Learns masks of a copy of a model (TinyCLIP's automatic inheritance) and writes the student that they select, to be
    distilled, to `run.output_dir`.

    Args:
        source: What to select from; mostly the first teacher.
        teachers: Frozen; the targets of several are averaged.
        student: The shape to select.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the source, or the source's weights
            are packed.
    """
    check_float(source.model, "Masking")
    pairs = training_pairs(data)
    check_same_preprocessing(source.processor, teachers)
    ramp = steps_or_share(arguments.ramp_steps, step_count(arguments, pairs))
    stage = MaskingStage(
        frozen(copy.deepcopy(source.model), arguments.freeze),
        [teacher.model for teacher in teachers],
        arguments.logit_scale,
        arguments.learn_logit_scale,
        student,
        max(1, round(ramp)),
        arguments.losses,
    )

    def save(folder: Path, metrics: dict[str, float]) -> None:
        model, results = stage.student(), evaluated(data, metrics)
        costs = CostReport(teacher=model_cost(source.model.config), student=model_cost(model.config))
        card = render_card(
            source.id,
            str(costs),
            model_class=type(model).__name__,
            method="Its weights were selected from the teacher's by learned masks (TinyCLIP), and trained with them.",
            revision=source.revision,
            results=results,
            recipe=recipe,
        )
        write_student_folder(folder, model, source.processor, card, results)

    return run_stage(
        stage,
        arguments,
        run,
        data,
        source.processor,
        name="masking",
        pairs=pairs,
        evaluate=evaluation_function(data, source.processor, run),
        save=save,
        config={
            "source": [source.id, source.revision],
            "teachers": [[one.id, one.revision] for one in teachers],
            "student": student.to_dict(),
        },
        recipe=recipe,
    )
