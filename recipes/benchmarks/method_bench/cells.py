"""The cells of the bench: a student by a method, made once by the package's own compression, and what it reaches."""

import shutil
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

from study.cells import cell_path, made_once
from study.curves import evaluation_interval, evaluations, last_metrics, read_log
from study.data import SOURCE, embedded_data, embedded_teacher, epochs
from study.files import read_json, write_json
from study.shapes import tower_configs
from transformers import CLIPModel, set_seed

from clipmap_hf.config import ClipMapConfig, student_config
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_config
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_steps
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.start import start_compressor
from clipmap_hf.starts import start_of
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, MaskingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


def finished(folder: Path, cell: dict) -> dict:
    """
    Reads what came out of a cell, which is made if it is not there.

    Args:
        folder: Of the bench.
        cell: All that decides it: `size` (its name), `towers` and `via` (as in `tower_configs`, of the student and of
            those on the way), `name` and `method` (how it is made: `initializer`, or `scratch`; `changes` of the
            `ClipMapConfig`; `losses`; `scale`, what else distillation is told; `stages`, the share of the steps that
            come before distillation), `rate` and `mapping_rate`, `steps` of all stages together, `batch_size`, `seed`,
            and whether it is for `validation`.

    Returns:
        The `cell`, its `recall` at the end and on the way (`curve`, with the pairs seen), `seconds` of all stages and
        of the start, `parameters`, and `macs` of an image and a text.
    """
    return made_once(cell_file(folder, cell), partial(_made, folder, cell), _summary)


def cell_file(folder: Path, cell: dict) -> Path:
    """Names the file of a cell's result."""
    words = (cell["size"], cell["name"], "validation" if cell["validation"] else "seed", cell["seed"])
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in " ".join(map(str, words))).split())
    return cell_path(folder / "cells", name, cell)


def configs(cell: dict) -> list[ClipMapConfig]:
    """Lists the sizes that a cell goes through, its own last."""
    method = cell["method"]
    return [
        ClipMapConfig(
            *tower_configs(towers),
            initializer=None if method["initializer"] == "scratch" else method["initializer"],
            seed=cell["seed"],
            **method.get("changes", {}),
        )
        for towers in (*cell["via"], cell["towers"])
    ]


def _summary(result: dict) -> str:
    return f"mean recall {result['recall']['mean_recall']:.4f}, {result['seconds']:.0f} s"


def _made(folder: Path, cell: dict, work: Path) -> dict:
    every = None if cell["validation"] else evaluation_interval(cell["steps"])
    run = RunArguments(str(work), seed=cell["seed"], eval_steps=every, save_steps=cell["steps"])
    context = RunContext(run, embedded_data(folder, cell["validation"]))
    with redirect_stdout(StringIO()):
        make = _from_scratch if cell["method"]["initializer"] == "scratch" else _compressed
        started, untrained = make(folder, cell, context)
    curve, seconds = _read(work, len(cell["via"]), untrained)
    cost = model_cost(load_config(str(work)))
    return {
        "cell": cell,
        "recall": last_metrics(curve),
        "curve": curve,
        "seconds": started + seconds,
        "parameters": cost.parameters,
        "macs": cost.macs,
    }


def _compressed(folder: Path, cell: dict, context: RunContext) -> tuple[float, dict[str, float] | None]:
    """Compresses the teacher; returns the seconds of a start from data, and what an untrained student reaches."""
    method, students = cell["method"], configs(cell)
    per_step = cell["steps"] // len(students)
    steps = {stage: round(share * per_step) for stage, share in method.get("stages", {}).items()}
    numbers = {"batch_size": cell["batch_size"], "learning_rate": cell["rate"]}
    started = _started(folder, cell, context) if start_of(students[0]).reads_pairs else 0.0
    arguments = CompressionArguments(
        masking=MaskingStageArguments(max_steps=steps.get("masking", 0), losses=method["losses"], **numbers),
        mapping=MappingStageArguments(
            max_steps=steps.get("mapping", 0), **numbers | {"learning_rate": cell.get("mapping_rate", cell["rate"])}
        ),
        distillation=_distillation(cell, per_step - sum(steps.values())),
    )
    context = replace(context, cache=_cache(folder, cell, context))
    compress_in_steps(SOURCE, [SOURCE], students, context, arguments)
    return started, None if steps else _untrained(folder, cell, context)


def _started(folder: Path, cell: dict, context: RunContext) -> float:
    """Puts a start where the run takes it up, and returns the seconds that it took when it was made."""
    kept = _kept_start(folder, cell, context)
    began = time.perf_counter()
    start_compressor(SOURCE, configs(cell)[0], kept, CalibrationArguments())
    seconds = kept.output_dir / "seconds.json"
    if not seconds.exists():
        write_json(seconds, {"seconds": time.perf_counter() - began})
    shutil.copytree(kept.output_dir, context.output_dir, dirs_exist_ok=True)
    return read_json(seconds)["seconds"]


def _untrained(folder: Path, cell: dict, context: RunContext) -> dict[str, float]:
    """Evaluates the student that distillation begins with: made of the teacher, or of what the size before left."""
    source = ModelId(str(context.output_dir / str(len(cell["via"])))) if cell["via"] else SOURCE
    kept = _kept_start(folder, cell, context)
    student = start_compressor(source, configs(cell)[-1], kept, CalibrationArguments()).export()
    return evaluate_retrieval(student, evaluation_batches(context.data, embedded_teacher().processor))


def _kept_start(folder: Path, cell: dict, context: RunContext) -> RunContext:
    """Says where starts from data are kept for other cells: a run's own is removed when it is finished."""
    kept = _shared(folder / "starts" / cell["method"]["initializer"], cell)
    return replace(context, run=replace(context.run, output_dir=str(kept)))


def _from_scratch(folder: Path, cell: dict, context: RunContext) -> tuple[float, None]:
    """Trains a student of random weights, which take no time and reach nothing by themselves."""
    set_seed(cell["seed"])
    student, teacher = CLIPModel(student_config(load_config(SOURCE.id), *configs(cell))), embedded_teacher()
    kept = _cache(folder, cell, context)
    kept = replace(kept, teacher_cache=kept.teacher_cache and str(Path(kept.teacher_cache) / "1"))
    arguments, context = _distillation(cell, cell["steps"]), replace(context, cache=kept)
    DistillationTrainer(student, teacher, arguments, context=context).train()
    return 0.0, None


def _distillation(cell: dict, steps: int) -> DistillationStageArguments:
    return DistillationStageArguments(
        max_steps=steps,
        batch_size=cell["batch_size"],
        learning_rate=cell["rate"],
        losses=cell["method"]["losses"],
        **cell["method"].get("scale", {}),
    )


def _cache(folder: Path, cell: dict, context: RunContext) -> TeacherCacheArguments:
    """Says where the teacher's embeddings are kept for other cells; nowhere if the loss asks for more than those."""
    if "hidden" in cell["method"]["losses"]:
        return TeacherCacheArguments()
    views = epochs(context.data, cell["steps"], cell["batch_size"])
    return TeacherCacheArguments(str(_shared(folder / "caches", cell)), views)


def _shared(folder: Path, cell: dict) -> Path:
    """Names a folder that cells of other methods and rates use too, but no process that works on another size."""
    return folder / f"{cell['size'].split()[0]}-{'validation' if cell['validation'] else 'test'}-seed{cell['seed']}"


def _read(work: Path, before: int, untrained: dict[str, float] | None = None) -> tuple[list[dict], float]:
    """
    Reads the logs of a cell.

    Args:
        work: Where it was made.
        before: How many sizes there were on the way.
        untrained: What the student of its own size reached before any stage, if that was evaluated.

    Returns:
        All evaluations of the student's own size, with the pairs that were seen, and the seconds of all stages.
    """
    curve, pairs, seconds = [], 0, 0.0
    for folder in (*(work / str(step + 1) for step in range(before)), work):
        if folder == work and untrained is not None:
            curve.append({"pairs": pairs, **untrained})
        for log in (folder / "masked", folder / "mapped", folder):
            lines = read_log(log)
            if folder == work:
                curve += evaluations(lines, pairs)
            pairs += lines[-1]["pairs"] if lines else 0
            seconds += lines[-1]["seconds"] if lines else 0.0
    return curve, seconds
