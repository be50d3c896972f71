"""The runs of a study: each is made of its settings, once, and begins with what another run leaves."""

import json
import math
import tempfile
import zlib
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path

from initializer_study.ablations import without
from initializer_study.pairs import embedded_data
from torch import nn

from clipmap_hf.atomic import write_atomically
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.teacher_cache import TeacherCache
from clipmap_hf.demo import TEACHER
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models import load_model
from clipmap_hf.teachers import Teacher, make_teacher_cache
from clipmap_hf.training.arguments import (
    DistillationArguments,
    MappingArguments,
    RunArguments,
    StageArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.setup import evaluation_batches, run_stage, training_pairs
from clipmap_hf.training.stages import DistillationStage, MappingStage, Stage


CALIBRATED = ("importance", "calibrated")  # these initializers look at training pairs
# Which corrections mapping trains; a layered one has `*` in its name, and one dimension more.
TRAINED = {
    "operators": lambda name, delta: False,
    "operators and vectors": lambda name, delta: delta.ndim - ("*" in name) == 1,
    "operators and all deltas": lambda name, delta: True,
}
EVALUATIONS = 10  # on the way of a whole budget


def finished(folder: Path, settings: dict) -> dict:
    """
    What came out of a run, which is made if it is not there.

    Args:
        folder: Of the study.
        settings: All that decides the run: `size` (its name), `towers` (width, depth and perhaps FFN width), `method`,
            `changes` (of the `ClipMapConfig`, `calibration_pairs`, or an ingredient that it is `without`), `seed`,
            `validation`, `batch_size`, `budget` (steps of all its stages), and of each stage `None` or `steps`, `rate`
            and what else there is to it.

    Returns:
        `settings`, recall after each stage (`untrained`, `mapping`, `distillation`), and all evaluations (`curve`).
    """
    path = result_file(folder, settings)
    if not path.exists():
        result = {**_made(folder, settings), "settings": settings}
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
        last = result["curve"][-1]
        print(f"{path.stem}: " + ", ".join(f"{name} {value:.3g}" for name, value in last.items()), flush=True)
    return json.loads(path.read_text())


def result_file(folder: Path, settings: dict) -> Path:
    """Where a run's result lies: what it is about, for readers, and a hash of all its settings."""
    steps = [str(settings[stage]["steps"] if settings[stage] else 0) for stage in ("mapping", "distillation")]
    name = f"{settings['size']}-{settings['method']}-{'+'.join(steps)}-seed{settings['seed']}"
    digest = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    return folder / "runs" / f"{name.replace(',', '').replace(' ', '')}-{digest:08x}.json"


def _made(folder: Path, settings: dict) -> dict:
    for stage, make in (("distillation", _distilled), ("mapping", _mapped)):
        if settings[stage]:
            return make(folder, settings, {**settings, stage: None})
    _, _, evaluate = source(folder, settings["validation"])
    recall = evaluate(start(folder, json.dumps(settings)).export())
    return {"untrained": recall, "curve": [{"pairs": 0, **recall}]}


def _mapped(folder: Path, settings: dict, before: dict) -> dict:
    """Trains the operators of a start, and keeps the student for runs that distill it."""
    result, mapper = finished(folder, before), deepcopy(start(folder, json.dumps(before)).mapper)
    numbers = settings["mapping"]
    if numbers["trains"] is not None:
        mapper.operators.requires_grad_(True)
        for name, correction in mapper.corrections.items():
            for delta in correction.parameters():
                delta.requires_grad_(TRAINED[numbers["trains"]](name, delta))
    arguments = MappingArguments(
        steps=numbers["steps"], batch_size=settings["batch_size"], learning_rate=numbers["rate"]
    )
    asked = [teacher().model] if numbers["weight"] else []  # its cache has the captions of the other stage only
    stage = MappingStage(mapper, arguments.logit_scale, arguments.learn_logit_scale, asked, losses(numbers["weight"]))
    curve = train(folder, settings, "mapping", stage, arguments)
    stage.student().save_pretrained(_mapped_student(folder, settings))
    return _continued(result, "mapping", curve)


def _distilled(folder: Path, settings: dict, before: dict) -> dict:
    """Distills the student that the run before leaves."""
    result, numbers = finished(folder, before), settings["distillation"]
    if before["mapping"]:
        student = load_model(str(_mapped_student(folder, before)))
    else:
        student = start(folder, json.dumps(before)).export()
    arguments = DistillationArguments(
        steps=numbers["steps"],
        batch_size=settings["batch_size"],
        learning_rate=numbers["rate"],
        losses=numbers.get("losses") or losses(numbers["weight"]),
    )
    cached = embeddings(folder, settings)
    stage = DistillationStage(
        student,
        [],
        arguments.logit_scale,
        arguments.learn_logit_scale,
        arguments.losses,
        cached.summary["dims"],
    )
    curve = train(folder, settings, "distillation", stage, arguments, cached)
    return _continued(result, "distillation", curve)


def losses(weight: float) -> dict[str, float]:
    """Eq. 13, with λ as the weight."""
    return {name: share for name, share in (("affinity", weight), ("contrastive", 1 - weight)) if share}


def _mapped_student(folder: Path, settings: dict) -> Path:
    return folder / "students" / result_file(folder, settings).stem


def _continued(before: dict, stage: str, curve: list[dict]) -> dict:
    """A result with one more stage, whose pairs are counted on from those before."""
    seen = before["curve"][-1]["pairs"]
    curve = [{**point, "pairs": seen + point["pairs"]} for point in curve]
    last = {name: value for name, value in curve[-1].items() if name != "pairs"}
    return {**before, stage: last, "curve": before["curve"] + curve}


def train(
    folder: Path,
    settings: dict,
    name: str,
    stage: Stage,
    arguments: StageArguments,
    cached: TeacherCache | None = None,
) -> list[dict]:
    """Trains a stage and returns its evaluations, with the pairs that it had seen at each."""
    data, pairs, evaluate = source(folder, settings["validation"])
    with tempfile.TemporaryDirectory() as output:
        every = max(1, settings["budget"] // EVALUATIONS)
        run = RunArguments(output, seed=settings["seed"], eval_every=every)
        run_stage(
            stage,
            arguments,
            run,
            data,
            teacher().processor,
            name=name,
            pairs=pairs,
            evaluate=evaluate,
            teacher_cache=cached,
        )
        lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [
        {"pairs": line["pairs"]} | {name.removeprefix("eval_"): line[name] for name in line if "recall" in name}
        for line in lines
        if "eval_recall@1" in line
    ]


@lru_cache(maxsize=32)  # about 20 MB each
def start(folder: Path, settings: str) -> ClipMapCompressor:
    """The compressor that a run begins with; its settings, without stages, as JSON."""
    settings = json.loads(settings)
    vision, text = (
        TowerConfig(**dict(zip(("hidden_size", "num_hidden_layers", "intermediate_size"), sizes, strict=False)))
        for sizes in settings["towers"]
    )
    changes, calibration = {"calibration_pairs": 2048, **settings["changes"]}, {}
    calibration_pairs = changes.pop("calibration_pairs")
    if settings["method"] in CALIBRATED:
        _, pairs, _ = source(folder, settings["validation"])
        pairs = pairs.pairs.shuffle(seed=settings["seed"])  # so that every seed calibrates on others
        pairs = pairs.remove_columns("caption") if changes.get("without") == "captions" else pairs
        calibration = {"calibration_data": pairs, "calibration_pairs": calibration_pairs}
    ingredient = changes.pop("without", None)
    config = ClipMapConfig(vision, text, initializer=settings["method"], seed=settings["seed"], **changes)
    with without(ingredient):
        return ClipMapCompressor.from_pretrained(TEACHER, config, **calibration)


@cache
def teacher() -> Teacher:
    """The embedded one, loaded once."""
    return Teacher.load(str(TEACHER))


@cache
def source(folder: Path, validation: bool) -> tuple:
    """The training data of a run: as arguments, loaded, and the function that evaluates a model on the other pairs."""
    data = embedded_data(folder, validation)
    batches = list(evaluation_batches(data, teacher().processor))

    def evaluate(model: nn.Module) -> dict[str, float]:
        recall = evaluate_retrieval(model, batches, ks=(1, 5))
        ways = ("image_to_text", "text_to_image")
        return {f"recall@{k}": sum(recall[f"{way}_recall@{k}"] for way in ways) / len(ways) for k in (1, 5)}

    return data, training_pairs(data), evaluate


def embeddings(folder: Path, settings: dict) -> TeacherCache:
    """The teacher's, of all that a run may distill on."""
    pairs = len(source(folder, settings["validation"])[1])
    epochs = math.ceil(settings["budget"] / (pairs // settings["batch_size"]))
    return teacher_cache(folder, settings["validation"], settings["seed"], views=epochs)


@cache
def teacher_cache(folder: Path, validation: bool, seed: int, views: int) -> TeacherCache:
    """The teacher's embeddings of all that a run with this seed may distill on."""
    data, pairs, _ = source(folder, validation)
    name = f"{'validation' if validation else 'test'}-seed{seed}-views{views}"
    arguments = TeacherCacheArguments(str(folder / "caches" / name), views)
    return make_teacher_cache([teacher()], teacher().processor, data, arguments, seed=seed, pairs=pairs)
