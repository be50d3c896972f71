"""What the recipes run: mapping and distillation, each from models and arguments to a written student folder."""

from pathlib import Path

from accelerate import PartialState
from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.data.pairs import PairDataset
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.training.arguments import DataArguments, DistillationArguments, MappingArguments, RunArguments
from clipmap_hf.training.setup import evaluation_function, run_stage
from clipmap_hf.training.stages import DistillationStage, MappingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_distillation", "run_mapping"]


def run_mapping(
    compressor: ClipMapCompressor,
    arguments: MappingArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    recipe: str | None = None,
    pairs: PairDataset | None = None,
) -> TrainResult:
    """
    Trains a compressor's operators and writes the mapped student, with its map, to `run.output_dir`.

    Args:
        compressor: Trained in place.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for the card.
        pairs: The training pairs, if they are loaded already.
    """
    stage = MappingStage(compressor.mapper, arguments.logit_scale, arguments.learn_logit_scale)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        compressor.save_pretrained(folder, results={"student": metrics} if metrics else None, recipe=recipe)

    processor = compressor.processor
    callbacks = {"evaluate": evaluation_function(data, processor, run), "save": save}
    return run_stage(stage, arguments, run, data, processor, name="mapping", pairs=pairs, **callbacks)


def run_distillation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: CLIPProcessor,
    arguments: DistillationArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    teacher_id: str,
    recipe: str | None = None,
    pairs: PairDataset | None = None,
) -> TrainResult:
    """
    Distills a student and writes it, with a card that shows its results beside the teacher's, to `run.output_dir`.

    Args:
        student: Trained in place.
        teacher: Frozen.
        processor: Tokenizer and image processor of both.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        teacher_id: Hub id or folder of the teacher, for the card.
        recipe: The resolved arguments as YAML, for the card.
        pairs: The training pairs, if they are loaded already.
    """
    stage = DistillationStage(
        student, teacher, arguments.logit_scale, arguments.learn_logit_scale, arguments.distillation_weight
    )
    evaluate = evaluation_function(data, processor, run)
    teacher_metrics = None if evaluate is None else evaluate(teacher.to(PartialState().device))
    costs = CostReport(teacher=model_cost(teacher.config), student=model_cost(student.config))

    def save(folder: Path, metrics: dict[str, float]) -> None:
        card = render_card(
            teacher_id,
            str(costs),
            model_class=type(student).__name__,
            method="Its weights were distilled from the teacher's similarities (CLIP-Map's retraining stage).",
            results={"teacher": teacher_metrics, "student": metrics} if metrics else None,
            recipe=recipe,
        )
        write_student_folder(folder, student, processor, card)

    callbacks = {"evaluate": evaluate, "save": save}
    return run_stage(stage, arguments, run, data, processor, name="distillation", pairs=pairs, **callbacks)
