"""The cells of the bench: a student by one method, made once by the package's own compression, and what it reaches."""

import json
import math
import shutil
import time
import zlib
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path

from initializer_study.pairs import embedded_data
from transformers import CLIPModel, set_seed

from clipmap_hf.atomic import read_json, write_atomically, write_json
from clipmap_hf.compression import compress_in_steps
from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.demo import TEACHER
from clipmap_hf.evaluation.cost import model_cost
from clipmap_hf.mapping.initializers import NEED_PAIRS
from clipmap_hf.models import load_config
from clipmap_hf.runs import run_distillation
from clipmap_hf.starts import start_compressor
from clipmap_hf.teachers import Teacher
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.setup import training_pairs


EVALUATIONS = 10  # on the way of a whole budget
SOURCE = (str(TEACHER), None)


def finished(folder: Path, cell: dict) -> dict:
    """
    What came out of a cell, which is made if it is not there.

    Args:
        folder: Of the bench.
        cell: All that decides it: `size` (its name), `towers` and `via` (width, depth and perhaps FFN width of the
            towers of the student, and of those on the way), `name` and `method` (how it is made: `initializer`, or
            `scratch`; `changes` of the `ClipMapConfig`; `losses`; `scale`, what else distillation is told; `stages`,
            the share of the steps that come before distillation), `rate` and `mapping_rate`, `steps` of all stages
            together, `batch_size`, `seed`, and whether it is for `validation`.

    Returns:
        The `cell`, its `recall` at the end and on the way (`curve`, with the pairs seen), `seconds` of all stages and
        of the start, `parameters`, and `macs` of an image and a text.
    """
    path, work = cell_file(folder, cell), folder / "work" / cell_file(folder, cell).stem
    if not path.exists():
        result = {"cell": cell, **_made(folder, work, cell)}
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
        shutil.rmtree(work)
        print(f"{path.stem}: mean recall {result['recall']['mean_recall']:.4f}, {result['seconds']:.0f} s", flush=True)
    return json.loads(path.read_text())


def cell_file(folder: Path, cell: dict) -> Path:
    """Where a cell's result lies: what it is about, for readers, and a hash of all that decides it."""
    words = (cell["size"], cell["name"], "validation" if cell["validation"] else "seed", cell["seed"])
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in " ".join(map(str, words))).split())
    return folder / "cells" / f"{name}-{zlib.crc32(json.dumps(cell, sort_keys=True).encode()):08x}.json"


def configs(cell: dict) -> list[ClipMapConfig]:
    """The sizes that a cell goes through, its own last."""
    method, names = cell["method"], ("hidden_size", "num_hidden_layers", "intermediate_size")
    initializer = None if method["initializer"] == "scratch" else method["initializer"]
    return [
        ClipMapConfig(
            *(TowerConfig(**dict(zip(names, sizes, strict=False))) for sizes in towers),
            initializer=initializer,
            seed=cell["seed"],
            **method.get("changes", {}),
        )
        for towers in (*cell["via"], cell["towers"])
    ]


def _made(folder: Path, work: Path, cell: dict) -> dict:
    every = None if cell["validation"] else max(1, cell["steps"] // EVALUATIONS)
    run = RunArguments(str(work), seed=cell["seed"], eval_every=every, checkpoint_every=cell["steps"])
    data = embedded_data(folder, cell["validation"])
    with redirect_stdout(StringIO()):
        make = _from_scratch if cell["method"]["initializer"] == "scratch" else _compressed
        started = make(folder, cell, run, data)
    curve, seconds = _read(work, len(cell["via"]))
    cost = model_cost(load_config(str(work)))
    return {
        "recall": {name: value for name, value in curve[-1].items() if name != "pairs"},
        "curve": curve,
        "seconds": started + seconds,
        "parameters": cost.parameters,
        "macs": cost.macs,
    }


def _compressed(folder: Path, cell: dict, run: RunArguments, data: DataArguments) -> float:
    """Compresses the teacher, and returns the seconds of a start from data."""
    method, students = cell["method"], configs(cell)
    per_step = cell["steps"] // len(students)
    steps = {stage: round(share * per_step) for stage, share in method.get("stages", {}).items()}
    numbers = {"batch_size": cell["batch_size"], "learning_rate": cell["rate"]}
    started = _started(folder, cell, run, data) if students[0].initializer in NEED_PAIRS else 0.0
    compress_in_steps(
        SOURCE,
        [SOURCE],
        students,
        run,
        data,
        calibration=CalibrationArguments(),
        masking=MaskingArguments(steps=steps.get("masking", 0), losses=method["losses"], **numbers),
        mapping=MappingArguments(
            steps=steps.get("mapping", 0), **numbers | {"learning_rate": cell.get("mapping_rate", cell["rate"])}
        ),
        distillation=_distillation(cell, per_step - sum(steps.values())),
        cache=_cache(folder, cell, data),
    )
    return started


def _started(folder: Path, cell: dict, run: RunArguments, data: DataArguments) -> float:
    """Puts a start where the run takes it up, and returns the seconds that it took when it was made."""
    kept = _shared(folder / "starts" / cell["method"]["initializer"], cell)
    began = time.perf_counter()
    start_compressor(*SOURCE, configs(cell)[0], CalibrationArguments(), replace(run, output_dir=str(kept)), data)
    if not (kept / "seconds.json").exists():
        write_json(kept / "seconds.json", {"seconds": time.perf_counter() - began})
    shutil.copytree(kept, run.output_dir, dirs_exist_ok=True)
    return read_json(kept / "seconds.json")["seconds"]


def _from_scratch(folder: Path, cell: dict, run: RunArguments, data: DataArguments) -> float:
    """Trains a student of random weights, which take no time."""
    set_seed(cell["seed"])
    student, teacher = CLIPModel(student_config(load_config(TEACHER), *configs(cell))), Teacher.load(*SOURCE)
    kept = _cache(folder, cell, data)
    kept = replace(kept, teacher_cache=kept.teacher_cache and str(Path(kept.teacher_cache) / "1"))
    run_distillation(student, [teacher], teacher.processor, _distillation(cell, cell["steps"]), run, data, cache=kept)
    return 0.0


def _distillation(cell: dict, steps: int) -> DistillationArguments:
    return DistillationArguments(
        steps=steps,
        batch_size=cell["batch_size"],
        learning_rate=cell["rate"],
        losses=cell["method"]["losses"],
        **cell["method"].get("scale", {}),
    )


def _cache(folder: Path, cell: dict, data: DataArguments) -> TeacherCacheArguments:
    """Where the teacher's embeddings are kept for other cells; nowhere if the loss asks for more than embeddings."""
    if "hidden" in cell["method"]["losses"]:
        return TeacherCacheArguments()
    views = math.ceil(cell["steps"] / (_pairs(data.train_data) // cell["batch_size"]))
    return TeacherCacheArguments(str(_shared(folder / "caches", cell)), views)


def _shared(folder: Path, cell: dict) -> Path:
    """Where cells of other methods and rates look too, but no process that works on another size."""
    return folder / f"{cell['size'].split()[0]}-{'validation' if cell['validation'] else 'test'}-seed{cell['seed']}"


@cache
def _pairs(path: str) -> int:
    return len(training_pairs(DataArguments(path)))


def _read(work: Path, before: int) -> tuple[list[dict], float]:
    """All evaluations of the student's own size, with the pairs that were seen, and the seconds of all stages."""
    curve, pairs, seconds = [], 0, 0.0
    for folder in (*(work / str(step + 1) for step in range(before)), work):
        for log in (folder / "masked", folder / "mapped", folder):
            path = log / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if folder == work:
                recalls = [line for line in lines if "eval_mean_recall" in line]
                curve += [
                    {"pairs": pairs + line["pairs"]}
                    | {name.removeprefix("eval_"): line[name] for name in line if name.startswith("eval_")}
                    for line in recalls
                ]
            pairs += lines[-1]["pairs"] if lines else 0
            seconds += lines[-1]["seconds"] if lines else 0.0
    return curve, seconds
