"""What ternary weights keep: retrieval of the embedded teacher and of a student of it, by quantizer and training."""

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import StringIO
from pathlib import Path

from study.cells import made_once
from study.data import SOURCE, embedded_data, embedded_teacher
from study.rates import best_trial
from study.recall import recall_columns

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_model
from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_steps
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.ternarization import TernaryTrainer
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.ternary.config import PARTS
from clipmap_hf.ternary.model import set_backend
from clipmap_hf.ternary.quantizers import GRANULARITIES, QUANTIZERS
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


STUDENT = ClipMapConfig(
    vision=TowerConfig(hidden_size=64, num_hidden_layers=3), text=TowerConfig(hidden_size=64, num_hidden_layers=2)
)
FEATURE, CONTRASTIVE = {"feature": 2000.0}, {"contrastive": 1.0}
LEARNED_SCALE = {"logit_scale": 14.3, "learn_logit_scale": True}  # CLIP's, which learns more than a fixed 50
TWN = {"quantizer": "twn"}
STUDENT_RATE = 2e-3  # of the float student, as in recipes/configs/demo.yaml
VIEWS, EPOCH = 4, 58  # of each image, at most, that the teacher sees; steps in which all images are seen once
TRIAL = 0.32  # of the steps, which a trial of a learning rate takes


@dataclass(frozen=True)
class Row:
    """A way to ternary weights; rounding alone needs no seeds and no rate."""

    name: str
    model: str = "teacher"
    losses: dict[str, float] | None = field(default_factory=lambda: dict(FEATURE))
    options: dict = field(default_factory=dict)
    is_ternary: bool = True


def _rounded(quantizer: str, granularity: str, model: str = "teacher") -> Row:
    options = {"quantizer": quantizer, "granularity": granularity}
    return Row(f"rounded, {quantizer}, {granularity}", model, None, options)


def _trained(quantizer: str, granularity: str, model: str = "teacher") -> Row:
    options = {"quantizer": quantizer, "granularity": granularity}
    return Row(f"trained, {quantizer}, {granularity}", model, options=options)


def _alone(model: str) -> Row:
    return Row("trained without the teacher, twn, row", model, dict(CONTRASTIVE), LEARNED_SCALE | TWN)


_ROWS = (
    *(
        _rounded(quantizer, granularity)
        for quantizer in ("twn", "absmean2", "absmean")
        for granularity in GRANULARITIES
    ),
    *(_trained(quantizer, "row") for quantizer in QUANTIZERS),
    _alone("teacher"),
    Row("float, trained on", "student", is_ternary=False),
    _rounded("twn", "row", "student"),
    *(_trained(quantizer, "row", "student") for quantizer in QUANTIZERS),
    *(_trained("twn", granularity, "student") for granularity in ("tensor", "block")),
    Row("trained, twn, row, all parts", "student", options={"parts": list(PARTS)} | TWN),
    Row("trained, twn, row, in a ramp", "student", options={"ramp_steps": 0.5} | TWN),
    _alone("student"),
)
ROWS = {f"{row.model}: {row.name}": row for row in _ROWS}


def quality_rows(
    folder: Path, names: list[str], steps: int, rates: list[float], seeds: list[int]
) -> Iterator[dict[str, str]]:
    """
    Measures the recall of rows, mean ± standard deviation over seeds; what was measured before is read from `cells/`.
    The learning rate of a row is the best of `rates` in trials that are a third as long, by mean recall on a style
    that is held out of the training pairs.
    """
    test = embedded_data(folder, False)
    yield _table_row("teacher", "float", [_recall(Path(SOURCE.id), test)])
    students = [_student(folder, seed, steps, False) for seed in seeds]
    yield _table_row("student, a tenth", "float", [_recall(student, test) for student in students])
    for row in map(ROWS.get, names):
        rate = _best_rate(folder, row, steps, rates) if row.losses else rates[0]
        of_seeds = seeds if row.losses or row.model == "student" else seeds[:1]
        found = [_finished(folder, row, seed, steps, rate) for seed in of_seeds]
        yield _table_row(row.model, row.name, found, rate if row.losses else None)


def _best_rate(folder: Path, row: Row, steps: int, rates: list[float]) -> float:
    if len(rates) == 1:
        return rates[0]
    trial = max(1, round(TRIAL * steps))
    best, _ = best_trial(rates, lambda rate: _finished(folder, row, 0, trial, rate, validation=True)["mean_recall"])
    return best


def _table_row(model: str, name: str, recalls: list[dict[str, float]], rate: float | None = None) -> dict[str, str]:
    return {
        "model": model,
        "weights": name,
        **recall_columns(recalls),
        "learning rate": f"{rate:g}" if rate else "",
        "seeds": str(len(recalls)),
    }


def _finished(
    folder: Path, row: Row, seed: int, steps: int, rate: float, validation: bool = False
) -> dict[str, float]:
    """Reads what a row reaches, which is measured if it is not there."""
    arguments = _arguments(row, steps, rate)
    # Not the checksum of other studies: cells of this name are there already.
    settings = sha256(repr((arguments, seed, steps, validation)).encode()).hexdigest()[:8]
    words = f"{row.model} {row.name} {'validation' if validation else seed} {settings}"
    path = folder / "cells" / f"{words.replace(',', '').replace(' ', '-')}.json"
    return made_once(path, partial(_made, folder, row, arguments, seed, steps, validation))


def _arguments(row: Row, steps: int, rate: float) -> TernaryStageArguments | DistillationStageArguments:
    kind = TernaryStageArguments if row.is_ternary else DistillationStageArguments
    return kind(
        max_steps=steps if row.losses else 0,
        batch_size=128,
        weight_decay=0.0,
        learning_rate=rate,
        losses=row.losses or FEATURE,
        **row.options,
    )


def _made(
    folder: Path,
    row: Row,
    arguments: TernaryStageArguments | DistillationStageArguments,
    seed: int,
    steps: int,
    validation: bool,
    work: Path,
) -> dict[str, float]:
    source = SOURCE.id if row.model == "teacher" else str(_student(folder, seed, steps, validation))
    student, teacher, data = load_model(source), embedded_teacher(), embedded_data(folder, validation)
    cache = _cache(folder, seed, validation, steps)
    context = RunContext(RunArguments(str(work), seed=seed, save_steps=max(1, steps)), data, cache=cache)
    trainer = TernaryTrainer if row.is_ternary else DistillationTrainer
    with redirect_stdout(StringIO()):
        trainer(student, teacher, arguments, context=context).train()
    return _recall(work, data)


def _cache(folder: Path, seed: int, validation: bool, steps: int) -> TeacherCacheArguments:
    views = min(VIEWS, steps // EPOCH + 1)
    return TeacherCacheArguments(str(folder / f"cache-{'validation' if validation else seed}-{views}"), views)


def _student(folder: Path, seed: int, steps: int, validation: bool) -> Path:
    """Makes the embedded teacher's student of the README, where it is not there: a calibrated start, distilled."""
    work = folder / f"student-{'validation' if validation else seed}-{steps}"
    if not (work / "model.safetensors").exists():
        arguments = CompressionArguments(
            distillation=DistillationStageArguments(
                max_steps=steps, batch_size=128, learning_rate=STUDENT_RATE, losses=FEATURE
            ),
        )
        data, cache = embedded_data(folder, validation), _cache(folder, seed, validation, steps)
        context = RunContext(RunArguments(str(work), seed=seed), data, cache=cache)
        with redirect_stdout(StringIO()):
            compress_in_steps(SOURCE, [SOURCE], [STUDENT], context, arguments)
    return work


def _recall(source: Path, data: DataArguments) -> dict[str, float]:
    """Evaluates what was written in the fastest arithmetic that it can be run in, which is also the least exact."""
    model = load_model(str(source))
    config = getattr(model.config, "quantization_config", None)
    if config is not None and config.granularity != "block":
        set_backend(model, "int8")
    return evaluate_retrieval(model, evaluation_batches(data, embedded_teacher().processor))
