"""What ternary weights keep: retrieval of the embedded teacher and of a student of it, by quantizer and training."""

import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from io import StringIO
from pathlib import Path

from initializer_study.pairs import embedded_data
from initializer_study.report import spread

from clipmap_hf.atomic import read_json, write_json
from clipmap_hf.compression import compress_in_steps
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.demo import TEACHER
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models import load_model, load_processor
from clipmap_hf.runs import run_distillation
from clipmap_hf.teachers import Teacher
from clipmap_hf.ternarization import run_ternarization
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.ternary.config import PARTS
from clipmap_hf.ternary.model import set_backend
from clipmap_hf.ternary.quantizers import GRANULARITIES, QUANTIZERS
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.setup import evaluation_batches


STUDENT = ClipMapConfig(
    vision=TowerConfig(hidden_size=64, num_hidden_layers=3), text=TowerConfig(hidden_size=64, num_hidden_layers=2)
)
FEATURE, CONTRASTIVE = {"feature": 2000.0}, {"contrastive": 1.0}
KS = (1, 5, 10)
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
    *(_rounded(quantizer, one) for quantizer in ("twn", "absmean2", "absmean") for one in GRANULARITIES),
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
    Recall of these rows, mean ± standard deviation over seeds; what was measured once is read from `cells/`. The
    learning rate of a row is the best of `rates` in trials that are a third as long, by mean recall on a style that is
    held out of the training pairs.
    """
    yield _table_row("teacher", "float", [_recall(TEACHER, embedded_data(folder, False))])
    students = [_student(folder, seed, steps, False) for seed in seeds]
    yield _table_row("student, a tenth", "float", [_recall(one, embedded_data(folder, False)) for one in students])
    for row in map(ROWS.get, names):
        rate = _best_rate(folder, row, steps, rates) if row.losses else rates[0]
        of_seeds = seeds if row.losses or row.model == "student" else seeds[:1]
        found = [_cell(folder, row, seed, steps, rate) for seed in of_seeds]
        yield _table_row(row.model, row.name, found, rate if row.losses else None)


def _best_rate(folder: Path, row: Row, steps: int, rates: list[float]) -> float:
    if len(rates) == 1:
        return rates[0]
    trial = max(1, round(TRIAL * steps))
    return max(rates, key=lambda rate: _cell(folder, row, 0, trial, rate, validation=True)["mean_recall"])


def _table_row(model: str, name: str, recalls: list[dict[str, float]], rate: float | None = None) -> dict[str, str]:
    values = {
        f"R@{k}": " / ".join(
            spread([100 * one[f"{way}_recall@{k}"] for one in recalls]) for way in ("image_to_text", "text_to_image")
        )
        for k in KS
    }
    return {
        "model": model,
        "weights": name,
        **values,
        "learning rate": f"{rate:g}" if rate else "",
        "seeds": str(len(recalls)),
    }


def _cell(folder: Path, row: Row, seed: int, steps: int, rate: float, validation: bool = False) -> dict[str, float]:
    kind, run_training = (
        (TernaryArguments, run_ternarization) if row.is_ternary else (DistillationArguments, run_distillation)
    )
    arguments = kind(
        steps=steps if row.losses else 0,
        batch_size=128,
        weight_decay=0.0,
        learning_rate=rate,
        losses=row.losses or FEATURE,
        **row.options,
    )
    settings = sha256(repr((arguments, seed, steps, validation)).encode()).hexdigest()[:8]
    words = f"{row.model} {row.name} {'validation' if validation else seed} {settings}"
    name = words.replace(",", "").replace(" ", "-")
    path, work = folder / "cells" / f"{name}.json", folder / "work" / name
    if not path.exists():
        source = TEACHER if row.model == "teacher" else _student(folder, seed, steps, validation)
        student, teacher = load_model(str(source)), Teacher.load(str(TEACHER), None)
        run, data = RunArguments(str(work), seed=seed, checkpoint_every=steps), embedded_data(folder, validation)
        with redirect_stdout(StringIO()):
            run_training(
                student,
                [teacher],
                teacher.processor,
                arguments,
                run,
                data,
                cache=_cache(folder, seed, validation, steps),
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _recall(work, data))
        shutil.rmtree(work)
    return read_json(path)


def _cache(folder: Path, seed: int, validation: bool, steps: int) -> TeacherCacheArguments:
    views = min(VIEWS, steps // EPOCH + 1)
    return TeacherCacheArguments(str(folder / f"cache-{'validation' if validation else seed}-{views}"), views)


def _student(folder: Path, seed: int, steps: int, validation: bool) -> Path:
    """The embedded teacher's student of the README: a calibrated start, distilled."""
    kind = "validation" if validation else seed
    work, source = folder / f"student-{kind}-{steps}", (str(TEACHER), None)
    if not (work / "model.safetensors").exists():
        numbers = {"batch_size": 128, "learning_rate": STUDENT_RATE, "losses": FEATURE}
        with redirect_stdout(StringIO()):
            compress_in_steps(
                source,
                [source],
                [STUDENT],
                RunArguments(str(work), seed=seed),
                embedded_data(folder, validation),
                calibration=CalibrationArguments(),
                masking=MaskingArguments(steps=0),
                mapping=MappingArguments(steps=0),
                distillation=DistillationArguments(steps=steps, **numbers),
                cache=_cache(folder, seed, validation, steps),
            )
    return work


def _recall(source: Path, data: DataArguments) -> dict[str, float]:
    """Of what was written, in the fastest arithmetic that it can be run in, which is also the least exact."""
    model = load_model(str(source))
    config = getattr(model.config, "quantization_config", None)
    if config is not None and config.granularity != "block":
        set_backend(model, "int8")
    return evaluate_retrieval(model, evaluation_batches(data, load_processor(str(TEACHER))))
