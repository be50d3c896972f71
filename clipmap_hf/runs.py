"""What the recipes run: mapping and distillation, each from models and arguments to a written student folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.data.build_cache import build_teacher_cache, finish_teacher_cache
from clipmap_hf.data.cache_files import MANIFEST, SUMMARY, read_json
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.teacher_cache import TeacherCache, cache_manifest, model_fingerprint
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.models import load_model, load_processor
from clipmap_hf.training.arguments import (
    DataArguments,
    DistillationArguments,
    MappingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.setup import (
    config_values,
    evaluation_function,
    run_stage,
    source_files,
    stage_seed,
    training_collator,
    training_pairs,
)
from clipmap_hf.training.stages import DistillationStage, MappingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["Teacher", "make_teacher_cache", "run_distillation", "run_mapping"]


@dataclass
class Teacher:
    """
    A frozen model that a student learns from.

    Args:
        model: A `CLIPModel`.
        processor: Its tokenizer and image processor.
        id: Hub id or folder.
        revision: Its branch, tag or commit on the Hub.
    """

    model: PreTrainedModel
    processor: CLIPProcessor
    id: str
    revision: str | None = None

    @classmethod
    def load(cls, teacher_id: str, revision: str | None = None, backend: str = "pil") -> "Teacher":
        """Loads model and processor; `backend` is the image processor's."""
        processor = load_processor(teacher_id, revision=revision, backend=backend)
        return cls(load_model(teacher_id, revision=revision), processor, teacher_id, revision)


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
    stage = MappingStage(compressor.mapper, arguments.logit_scale, arguments.learn_logit_scale)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        compressor.save_pretrained(folder, results={"student": metrics} if metrics else None, recipe=recipe)

    processor = compressor.processor
    callbacks = {"evaluate": evaluation_function(data, processor, run), "save": save}
    config = {
        "teachers": [[compressor.teacher_id, compressor.teacher_revision]],
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
    _check_same_preprocessing(processor, teachers)
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
        arguments.distillation_weight,
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


def make_teacher_cache(
    teachers: Sequence[Teacher],
    processor: CLIPProcessor,
    data: DataArguments,
    cache: TeacherCacheArguments,
    *,
    seed: int = 0,
    num_workers: int = 0,
    pairs: PairDataset | PairStream | None = None,
) -> TeacherCache:
    """
    The cache in `cache.teacher_cache`, with the views that a distillation with the same `seed` goes through. What of
    it is not there yet is computed; all processes share the work.

    Args:
        teachers: Whose embeddings to keep.
        processor: Tokenizer and image processor.
        data: The training pairs and how they are augmented.
        cache: Where, and how many views.
        seed: Of the run.
        num_workers: Processes that decode and augment.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If what is there was made of something else, which is named, or a teacher preprocesses in another
            way than `processor`.
    """
    state = join_processes()
    _check_same_preprocessing(processor, teachers)
    collator = training_collator(data, processor, stage_seed("distillation", seed))
    names = [
        {
            "id": Path(teacher.id).name if Path(teacher.id).is_dir() else teacher.id,
            "revision": teacher.revision,
            "weights": model_fingerprint(teacher.model),
            "projection_dim": teacher.model.config.projection_dim,
        }
        for teacher in teachers
    ]
    manifest = cache_manifest(names, collator, cache.views, source_files(data))
    folder = Path(cache.teacher_cache)
    complete = (folder / SUMMARY).is_file()
    if not complete or read_json(folder / MANIFEST)["world_size"] == state.num_processes:
        build_teacher_cache(
            folder,
            [teacher.model.to(state.device) for teacher in teachers],
            (training_pairs(data) if pairs is None else pairs).pairs,
            collator,
            manifest,
            num_workers=num_workers,
            rank=state.process_index,
            world_size=state.num_processes,
            max_bad_fraction=data.max_bad_fraction,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            finish_teacher_cache(folder)
        state.wait_for_everyone()
    made = TeacherCache.open(folder)
    made.check(manifest)  # a complete one may have been made by another number of processes
    return made


def _check_same_preprocessing(processor: CLIPProcessor, teachers: Sequence[Teacher]) -> None:
    """Raises if the student's pixels and tokens would be something else to a teacher."""

    def what(processor: CLIPProcessor) -> dict[str, Any]:
        images, tokenizer = processor.image_processor, processor.tokenizer
        return {
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            "size": dict(images.size),
            "vocabulary": tokenizer.get_vocab(),
            "model_max_length": tokenizer.model_max_length,
        }

    ours = what(processor)
    for teacher in teachers:
        theirs = what(teacher.processor)
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            raise ValueError(
                f"The teacher {teacher.id!r} and the student preprocess in different ways ({', '.join(different)}), "
                "so they cannot learn from the same pixels and tokens. Take a teacher of the same processor."
            )
