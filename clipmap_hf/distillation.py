"""Distillation of a student, whatever of it is trained: from models and arguments to a written student folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.cost import CostReport, model_cost, with_bytes_of
from clipmap_hf.families import family_for
from clipmap_hf.hub.card import hub_dataset, render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.hub.results import SetResults
from clipmap_hf.models import config_values
from clipmap_hf.teachers import Teacher, check_same_preprocessing, make_teacher_cache
from clipmap_hf.training.arguments import DataArguments, DistillationArguments, RunArguments, TeacherCacheArguments
from clipmap_hf.training.setup import evaluation_function, run_stage, training_pairs
from clipmap_hf.training.stages import DistillationStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["distill", "evaluated", "frozen"]


def distill(
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    processor: CLIPProcessor,
    arguments: DistillationArguments,
    run: RunArguments,
    data: DataArguments,
    *,
    make_stage: Callable[..., DistillationStage],
    export: Callable[[DistillationStage], PreTrainedModel],
    said: Mapping[str, Any],
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
        make_stage: `DistillationStage`, or what takes the same arguments. Whatever it is, its batches are those of the
            stage `distillation`, whose views a teacher cache holds.
        export: The model to write, from the stage.
        said: What else `render_card` is told: `method`, and of a ternary model that it is `packed`.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.
        recipe: The resolved arguments as YAML, for the card and `arguments.yaml`.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the student.
    """
    check_same_preprocessing(processor, teachers)
    cached = _is_cached(cache, arguments)
    pairs = training_pairs(data) if pairs is None else pairs
    numbers = {"seed": run.seed, "num_workers": run.num_workers}
    teacher_cache = make_teacher_cache(teachers, processor, data, cache, pairs=pairs, **numbers) if cached else None
    evaluate = evaluation_function(data, processor, run)
    teacher_metrics = None if evaluate is None else evaluate(teachers[0].model.to(join_processes().device))
    if cached:  # the stage moves those that it uses
        for teacher in teachers:
            teacher.model.cpu()
    stage = make_stage(
        frozen(student, arguments.freeze),
        [teacher.model for teacher in teachers] if teacher_cache is None else [],
        arguments.logit_scale,
        arguments.learn_logit_scale,
        arguments.losses,
        teacher_cache.summary["dims"] if teacher_cache else (),
    )
    teacher_cost, student_cost = model_cost(teachers[0].model.config), model_cost(student.config)

    def save(folder: Path, metrics: dict[str, float]) -> None:
        results, written = evaluated(data, metrics, teacher_metrics), export(stage)
        card = render_card(
            teachers[0].id,
            str(CostReport(teacher=teacher_cost, student=with_bytes_of(student_cost, written))),
            model_class=type(student).__name__,
            revision=teachers[0].revision,
            results=results,
            recipe=recipe,
            **said,
        )
        write_student_folder(folder, written, processor, card, results)

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


def evaluated(
    data: DataArguments, student: dict[str, float], teacher: dict[str, float] | None = None
) -> list[SetResults]:
    """What an evaluation on `data.eval_data` gave a student, and perhaps its teacher; nothing if there was none."""
    if not student:
        return []
    dataset_id = hub_dataset(data.eval_data)
    name = dataset_id or Path(data.eval_data).name
    return [SetResults(name, student, teacher, dataset_id, split=data.eval_split)]


def _is_cached(cache: TeacherCacheArguments | None, arguments: DistillationArguments) -> bool:
    cached = cache is not None and cache.teacher_cache is not None
    if cached and "hidden" in arguments.losses:
        raise ValueError("The hidden loss asks the teacher itself; leave out teacher_cache, or the loss.")
    return cached


def frozen(student: PreTrainedModel, tower: str | None) -> PreTrainedModel:
    """The student, with a tower and its projection left out of training."""
    family = family_for(student.config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(tower is None or family.match(name).tower != tower)
    return student
