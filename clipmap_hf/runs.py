"""What the recipes run: mapping and distillation, each from models and arguments to a written student folder."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.atomic import read_json, write_json
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.mapping.initializers import NEED_PAIRS
from clipmap_hf.models import load_processor
from clipmap_hf.teachers import Teacher, check_same_preprocessing, make_teacher_cache
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.masking import MaskingStage
from clipmap_hf.training.optimization import step_count
from clipmap_hf.training.setup import (
    config_values,
    evaluation_function,
    run_stage,
    source_files,
    training_pairs,
)
from clipmap_hf.training.stages import DistillationStage, MappingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_distillation", "run_mapping", "run_masking", "start_compressor"]

_ORIGIN = "origin.json"


def start_compressor(
    teacher_id: str,
    revision: str | None,
    student: ClipMapConfig | None,
    calibration: CalibrationArguments,
    run: RunArguments,
    data: DataArguments,
) -> ClipMapCompressor:
    """
    Starts to compress a teacher, from calibration data if `student` allows it. Without `student`, goes on with a map.

    A start from data is kept in `start/` inside `run.output_dir`, an untrained student with its map, and taken from
    there when the same command runs again.

    Args:
        teacher_id: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        student: The size to make, and how its operators start.
        calibration: The pairs to start from.
        run: Its seed draws them.
        data: The training pairs, and how they are read.
    """
    if student is None or student.initializer not in (None, *NEED_PAIRS):
        return ClipMapCompressor.from_pretrained(teacher_id, student, revision=revision, backend=data.image_backend)
    state, folder = join_processes(), Path(run.output_dir) / "start"
    origin = {
        "teacher": [teacher_id, revision],
        "student": student.to_dict(),
        "calibration": dataclasses.asdict(calibration),
        "data": source_files(_calibration_source(calibration, data))
        | {"caption_column": data.caption_column, "streaming": data.streaming, "image_backend": data.image_backend},
        "seed": run.seed,
    }
    if run.resume == "auto" and (folder / _ORIGIN).is_file() and read_json(folder / _ORIGIN) == origin:
        return ClipMapCompressor.from_pretrained(folder, backend=data.image_backend)
    batches = _calibration_pairs(teacher_id, revision, calibration, run, data)
    compressor = ClipMapCompressor.from_pretrained(
        teacher_id, student, calibration_data=batches, revision=revision, backend=data.image_backend
    )
    state.wait_for_everyone()  # none may look for what another writes
    if state.is_main_process:
        (folder / _ORIGIN).unlink(missing_ok=True)  # it may be that of another start
        compressor.save_pretrained(folder)
        write_json(folder / _ORIGIN, origin)
    return compressor


def _calibration_source(calibration: CalibrationArguments, data: DataArguments) -> DataArguments:
    return dataclasses.replace(data, train_data=calibration.calibration_data or data.train_data)


def _calibration_pairs(
    teacher_id: str, revision: str | None, calibration: CalibrationArguments, run: RunArguments, data: DataArguments
) -> CalibrationPairs:
    caption = data.caption_column[0]
    rows = load_pairs(
        _calibration_source(calibration, data).train_data,
        split=data.train_split,
        image_column=data.image_column,
        caption_columns=[caption],
        streaming=data.streaming,
    )
    rows = rows if caption == "caption" else rows.rename_column(caption, "caption")
    processor = load_processor(teacher_id, revision=revision, backend=data.image_backend)
    return CalibrationPairs(rows, processor, calibration.calibration_pairs, data.max_bad_fraction, run.seed)


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
    distills = set(arguments.losses) != {"contrastive"}
    teachers = [Teacher.load(*teacher, backend=data.image_backend).model] if distills else []
    numbers = (arguments.logit_scale, arguments.learn_logit_scale)
    stage = MappingStage(compressor.mapper, *numbers, teachers, arguments.losses)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        compressor.save_pretrained(folder, results={"student": metrics} if metrics else None, recipe=recipe)

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
        ValueError: If a teacher preprocesses images or texts in another way than the student.
    """
    check_same_preprocessing(processor, teachers)
    pairs = training_pairs(data) if pairs is None else pairs
    cached = cache is not None and cache.teacher_cache is not None
    numbers = {"seed": run.seed, "num_workers": run.num_workers}
    teacher_cache = make_teacher_cache(teachers, processor, data, cache, pairs=pairs, **numbers) if cached else None
    evaluate = evaluation_function(data, processor, run)
    teacher_metrics = None if evaluate is None else evaluate(teachers[0].model.to(join_processes().device))
    if cached:  # the stage moves those that it uses
        for teacher in teachers:
            teacher.model.cpu()
    stage = DistillationStage(
        student,
        [teacher.model for teacher in teachers] if teacher_cache is None else [],
        arguments.logit_scale,
        arguments.learn_logit_scale,
        arguments.losses,
        teacher_cache.summary["dims"] if teacher_cache else (),
    )
    costs = CostReport(teacher=model_cost(teachers[0].model.config), student=model_cost(student.config))
    others = "".join(f", with {Path(one.id).name if Path(one.id).is_dir() else one.id}" for one in teachers[1:])

    def save(folder: Path, metrics: dict[str, float]) -> None:
        card = render_card(
            teachers[0].id,
            str(costs),
            model_class=type(student).__name__,
            method="Its weights were distilled from the teacher's similarities (CLIP-Map's retraining stage)"
            f"{others}.",
            results={"teacher": teacher_metrics, "student": metrics} if metrics else None,
            recipe=recipe,
        )
        write_student_folder(folder, student, processor, card)

    return run_stage(
        stage,
        arguments,
        run,
        data,
        processor,
        name="distillation",
        pairs=pairs,
        evaluate=evaluate,
        save=save,
        config={
            "teachers": [[teacher.id, teacher.revision] for teacher in teachers],
            "student": config_values(student.config),
        },
        teacher_cache=teacher_cache,
        recipe=recipe,
    )


def run_masking(
    teachers: Sequence[Teacher],
    student: ClipMapConfig,
    arguments: MaskingArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    recipe: str | None = None,
) -> TrainResult:
    """
    Learns masks of a copy of the first teacher (TinyCLIP's automatic inheritance) and writes the student that they
    select, to be distilled, to `run.output_dir`.

    Args:
        teachers: Frozen; the targets of several are averaged.
        student: The shape to select.
        arguments: The stage's numbers.
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.
    """
    first, pairs = teachers[0], training_pairs(data)
    check_same_preprocessing(first.processor, teachers)
    steps, ramp = step_count(arguments, pairs), arguments.ramp_steps
    stage = MaskingStage(
        copy.deepcopy(first.model),
        [teacher.model for teacher in teachers],
        arguments.logit_scale,
        arguments.learn_logit_scale,
        student,
        max(1, round(ramp if ramp >= 1 else ramp * steps)),
        arguments.losses,
    )

    def save(folder: Path, metrics: dict[str, float]) -> None:
        model = stage.student()
        costs = CostReport(teacher=model_cost(first.model.config), student=model_cost(model.config))
        card = render_card(
            first.id,
            str(costs),
            model_class=type(model).__name__,
            method="Its weights were selected from the teacher's by learned masks (TinyCLIP), and trained with them.",
            results={"student": metrics} if metrics else None,
            recipe=recipe,
        )
        write_student_folder(folder, model, first.processor, card)

    return run_stage(
        stage,
        arguments,
        run,
        data,
        first.processor,
        name="masking",
        pairs=pairs,
        evaluate=evaluation_function(data, first.processor, run),
        save=save,
        config={"teachers": [[one.id, one.revision] for one in teachers], "student": student.to_dict()},
        recipe=recipe,
    )
