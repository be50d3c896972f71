"""What ternary weights keep: retrieval of the embedded teacher and of a student of it, by quantizer and training."""

import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from initializer_study.pairs import embedded_data
from initializer_study.report import spread

from clipmap_hf.compression import compress_in_steps
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.demo import TEACHER
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models import load_model, load_processor
from clipmap_hf.teachers import Teacher
from clipmap_hf.ternarization import run_ternarization
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.ternary.config import PARTS
from clipmap_hf.ternary.quantizers import GRANULARITIES
from clipmap_hf.training.arguments import (
    CalibrationArguments,
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


@dataclass(frozen=True)
class Row:
    """A way to ternary weights; rounding alone needs no seeds."""

    name: str
    model: str = "teacher"
    losses: dict[str, float] | None = field(default_factory=lambda: dict(FEATURE))
    options: dict = field(default_factory=dict)


def _rounded(quantizer: str, granularity: str, model: str = "teacher") -> Row:
    options = {"quantizer": quantizer, "granularity": granularity}
    return Row(f"rounded, {quantizer}, {granularity}", model, None, options)


def _trained(quantizer: str, granularity: str, model: str = "teacher") -> Row:
    options = {"quantizer": quantizer, "granularity": granularity}
    return Row(f"trained, {quantizer}, {granularity}", model, options=options)


_ROWS = (
    *(_rounded(quantizer, one) for quantizer in ("twn", "absmean2", "absmean") for one in GRANULARITIES),
    *(_trained(quantizer, "row") for quantizer in ("twn", "absmean2", "absmean", "learned")),
    *(_trained("twn", granularity) for granularity in ("tensor", "block")),
    Row("trained, twn, row, all parts", options={"parts": list(PARTS)}),
    Row("trained, twn, row, in a ramp", options={"ramp_steps": 0.5}),
    Row("trained without the teacher, twn, row", losses=dict(CONTRASTIVE)),
    _rounded("twn", "row", "student"),
    _trained("twn", "row", "student"),
    _trained("learned", "row", "student"),
)
ROWS = {f"{row.model}: {row.name}": row for row in _ROWS}


def quality_rows(
    folder: Path, names: list[str], steps: int, rates: dict[str, float], seeds: list[int]
) -> Iterator[dict[str, str]]:
    """Recall of these rows, mean ± standard deviation over seeds; what was measured once is read from `cells/`."""
    yield _table_row("teacher", "float", [_recall(TEACHER)])
    students = [_student(folder, seed, steps) for seed in seeds]
    yield _table_row("student, a tenth", "float", [_recall(one) for one in students])
    for row in map(ROWS.get, names):
        of_seeds = seeds if row.losses or row.model == "student" else seeds[:1]
        sources = {"teacher": [TEACHER] * len(seeds), "student": students}[row.model]
        found = [
            _cell(folder, row, source, seed, steps, rates) for seed, source in zip(of_seeds, sources, strict=False)
        ]
        yield _table_row(row.model, row.name, found)


def _table_row(model: str, name: str, recalls: list[dict[str, float]]) -> dict[str, str]:
    values = {
        f"R@{k}": " / ".join(
            spread([100 * one[f"{way}_recall@{k}"] for one in recalls]) for way in ("image_to_text", "text_to_image")
        )
        for k in KS
    }
    return {"model": model, "weights": name, **values, "seeds": str(len(recalls))}


def _cell(folder: Path, row: Row, source: Path, seed: int, steps: int, rates: dict[str, float]) -> dict[str, float]:
    name = f"{row.model}-{row.name}-{seed}-{steps}".replace(", ", "-").replace(" ", "-")
    path, work = folder / "cells" / f"{name}.json", folder / "work" / name
    if not path.exists():
        arguments = TernaryArguments(
            steps=steps if row.losses else 0,
            batch_size=128,
            weight_decay=0.0,
            learning_rate=rates[row.model],
            losses=row.losses or FEATURE,
            **row.options,
        )
        student, teacher = load_model(str(source)), Teacher.load(str(TEACHER), None)
        run, data = RunArguments(str(work), seed=seed, checkpoint_every=steps), embedded_data(folder, False)
        cache = TeacherCacheArguments(str(folder / f"cache-{seed}"), 4)
        with redirect_stdout(StringIO()):
            run_ternarization(student, [teacher], teacher.processor, arguments, run, data, cache=cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_recall(work)))
        shutil.rmtree(work)
    return json.loads(path.read_text())


def _student(folder: Path, seed: int, steps: int) -> Path:
    """The embedded teacher's student of the README: a calibrated start, distilled."""
    work, source = folder / f"student-{seed}", (str(TEACHER), None)
    if not (work / "model.safetensors").exists():
        numbers = {"batch_size": 128, "learning_rate": 2e-3, "losses": FEATURE}
        with redirect_stdout(StringIO()):
            compress_in_steps(
                source,
                [source],
                [STUDENT],
                RunArguments(str(work), seed=seed),
                embedded_data(folder, False),
                calibration=CalibrationArguments(),
                masking=MaskingArguments(steps=0),
                mapping=MappingArguments(steps=0),
                distillation=DistillationArguments(steps=steps, **numbers),
                cache=TeacherCacheArguments(str(folder / f"cache-{seed}"), 4),
            )
    return work


def _recall(source: Path) -> dict[str, float]:
    """Of what was written, with the backend that a user gets."""
    processor = load_processor(str(TEACHER))
    return evaluate_retrieval(load_model(str(source)), evaluation_batches(embedded_data(Path(), False), processor))
