"""The runs of a study: each is made of its settings, once, and begins with what another run leaves."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path

from initializer_study.ablations import without
from study.cells import cell_path, made_once
from study.curves import evaluation_interval, evaluations, last_metrics, read_log
from study.data import SOURCE, embedded_data, embedded_teacher, epochs
from study.recall import mean_recall
from study.shapes import tower_configs
from torch import nn

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_model
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.starts import STARTS
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.make import make_teacher_cache
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage


# Which corrections mapping trains; a layered correction has `*` in its name, and a dimension more.
TRAINED = {
    "operators": lambda name, delta: False,
    "operators and vectors": lambda name, delta: delta.ndim - ("*" in name) == 1,
    "operators and all deltas": lambda name, delta: True,
}
KS = (1, 5)


def finished(folder: Path, settings: dict) -> dict:
    """
    Reads what came out of a run, which is made if it is not there.

    Args:
        folder: Of the study.
        settings: All that decides the run: `size` (its name), `towers` (as in `tower_configs`), `method`, `changes`
            (of the `ClipMapConfig`, `calibration_pairs`, or an ingredient that it is `without`), `seed`,
            `validation`, `batch_size`, `budget` (steps of all its stages), and of each stage `None` or `steps`, `rate`
            and what else there is to it.

    Returns:
        Recall after each stage (`untrained`, `mapping`, `distillation`), all evaluations (`curve`), and `settings`.
    """
    return made_once(result_file(folder, settings), partial(_made, folder, settings), _summary)


def result_file(folder: Path, settings: dict) -> Path:
    """Names the file of a run's result."""
    steps = [str(settings[stage]["steps"] if settings[stage] else 0) for stage in ("mapping", "distillation")]
    name = f"{settings['size']}-{settings['method']}-{'+'.join(steps)}-seed{settings['seed']}"
    return cell_path(folder / "runs", name.replace(",", "").replace(" ", ""), settings)


def _summary(result: dict) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in result["curve"][-1].items())


def _made(folder: Path, settings: dict, work: Path) -> dict:
    for stage, make in (("distillation", _distilled), ("mapping", _mapped)):
        if settings[stage]:
            before = {**settings, stage: None}
            result = finished(folder, before)
            lines = make(folder, settings, before, work)
            curve = evaluations(lines, seen=result["curve"][-1]["pairs"])
            result |= {stage: last_metrics(curve), "curve": result["curve"] + curve}
            return result | {"settings": settings}
    recall = evaluate(folder, settings["validation"], start(folder, json.dumps(settings)).export())
    return {"untrained": recall, "curve": [{"pairs": 0, **recall}], "settings": settings}


def _mapped(folder: Path, settings: dict, before: dict, work: Path) -> list[dict]:
    """Trains the operators of a start, and keeps the student for runs that distill it."""
    mapper, numbers = deepcopy(start(folder, json.dumps(before)).mapper), settings["mapping"]
    if numbers["trains"] is not None:
        mapper.operators.requires_grad_(True)
        for name, correction in mapper.corrections.items():
            for delta in correction.parameters():
                delta.requires_grad_(TRAINED[numbers["trains"]](name, delta))
    arguments = MappingStageArguments(
        max_steps=numbers["steps"], batch_size=settings["batch_size"], learning_rate=numbers["rate"]
    )
    stage = MappingStage(
        mapper,
        # The teacher itself: its cache has the captions of the other stage only.
        teachers=[embedded_teacher().model] if numbers["weight"] else [],
        losses=losses(numbers["weight"]),
        logit_scale=arguments.logit_scale,
        learn_logit_scale=arguments.learn_logit_scale,
    )
    lines = train(folder, settings, work, "mapping", stage, arguments)
    stage.student().save_pretrained(_mapped_student(folder, settings))
    return lines


def _distilled(folder: Path, settings: dict, before: dict, work: Path) -> list[dict]:
    """Distills the student that the run before leaves."""
    numbers = settings["distillation"]
    if before["mapping"]:
        student = load_model(str(_mapped_student(folder, before)))
    else:
        student = start(folder, json.dumps(before)).export()
    arguments = DistillationStageArguments(
        max_steps=numbers["steps"],
        batch_size=settings["batch_size"],
        learning_rate=numbers["rate"],
        losses=numbers.get("losses") or losses(numbers["weight"]),
    )
    views = epochs(embedded_data(folder, settings["validation"]), settings["budget"], settings["batch_size"])
    cached = embeddings(folder, settings["validation"], settings["seed"], views)
    stage = DistillationStage(
        student,
        losses=arguments.losses,
        logit_scale=arguments.logit_scale,
        learn_logit_scale=arguments.learn_logit_scale,
        teacher_dims=cached.summary["dims"],
    )
    return train(folder, settings, work, "distillation", stage, arguments, cached)


def losses(weight: float) -> dict[str, float]:
    """Weighs the losses of Eq. 13, with λ as the weight."""
    return {name: share for name, share in (("affinity", weight), ("contrastive", 1 - weight)) if share}


def _mapped_student(folder: Path, settings: dict) -> Path:
    return folder / "students" / result_file(folder, settings).stem


def train(
    folder: Path,
    settings: dict,
    work: Path,
    name: str,
    stage: Stage,
    arguments: StageArguments,
    cached: TeacherCache | None = None,
) -> list[dict]:
    """Trains a stage and returns the lines of its log."""
    validation = settings["validation"]
    every, best = evaluation_interval(settings["budget"]), f"recall@{KS[-1]}"
    run = RunArguments(str(work), seed=settings["seed"], eval_steps=every, metric_for_best_model=best)
    context = replace(study_context(folder, validation), run=run)
    _StudyTrainer(name, stage, arguments, context, partial(evaluate, folder, validation), cached).train()
    return read_log(work)


class _StudyTrainer(StageTrainer):
    """Trains any stage, evaluates it in the study's own way, and writes nothing but its log."""

    def __init__(self, name, stage, arguments, context, evaluate, cached):
        super().__init__(arguments, context, embedded_teacher().processor)
        self.name, self.made_stage, self.evaluate_study, self.cached = name, stage, evaluate, cached

    def _make_stage(self) -> Stage:
        return self.made_stage

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        pass

    def _config(self) -> dict:
        return {}

    @property
    def _teacher_cache(self) -> TeacherCache | None:
        return self.cached

    @property
    def _evaluate(self):
        return lambda model, watched=iter: self.evaluate_study(model)


@lru_cache(maxsize=32)  # about 20 MB each
def start(folder: Path, settings: str) -> ClipMapCompressor:
    """Makes the compressor that a run begins with, of its settings, without stages, as JSON."""
    settings = json.loads(settings)
    changes, calibration = {"calibration_pairs": 2048, **settings["changes"]}, {}
    calibration_pairs, ingredient = changes.pop("calibration_pairs"), changes.pop("without", None)
    if STARTS[settings["method"]].reads_pairs:
        pairs = study_context(folder, settings["validation"]).pairs.pairs
        pairs = pairs.shuffle(seed=settings["seed"])  # so that every seed calibrates on others
        pairs = pairs.remove_columns("caption") if ingredient == "captions" else pairs
        calibration = {"calibration_data": pairs, "calibration_pairs": calibration_pairs}
    config = ClipMapConfig(
        *tower_configs(settings["towers"]), initializer=settings["method"], seed=settings["seed"], **changes
    )
    with without(ingredient):
        return ClipMapCompressor.from_pretrained(SOURCE.id, config, **calibration)


@cache
def study_context(folder: Path, validation: bool) -> RunContext:
    """Says what all runs train on, so that the pairs are loaded once; each has a folder and a seed of its own."""
    return RunContext(RunArguments(str(folder)), embedded_data(folder, validation))


def evaluate(folder: Path, validation: bool, model: nn.Module) -> dict[str, float]:
    """Measures a model's recall on the pairs that none is trained on, the mean of both ways."""
    recall = evaluate_retrieval(model, _evaluation_batches(folder, validation), ks=KS)
    return {f"recall@{k}": mean_recall(recall, k) for k in KS}


@cache
def _evaluation_batches(folder: Path, validation: bool) -> list[dict]:
    return list(evaluation_batches(embedded_data(folder, validation), embedded_teacher().processor))


@cache
def embeddings(folder: Path, validation: bool, seed: int, views: int) -> TeacherCache:
    """Makes the teacher's embeddings of all that a run with this seed may distill on."""
    context = study_context(folder, validation)
    name = f"{'validation' if validation else 'test'}-seed{seed}-views{views}"
    cache = TeacherCacheArguments(str(folder / "caches" / name), views)
    teacher = embedded_teacher()
    return make_teacher_cache([teacher], teacher.processor, context.data, cache, seed=seed, pairs=context.pairs)
