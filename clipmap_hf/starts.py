"""What the recipes begin with: a compressor, started from data where its config says so, and kept for another run."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from clipmap_hf.atomic import read_json, write_json
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.distributed import calibration_device, join_processes
from clipmap_hf.mapping.initializers import NEED_PAIRS
from clipmap_hf.models import load_config, load_model, load_processor
from clipmap_hf.shapes import choose_shape, kept_energy
from clipmap_hf.training.arguments import CalibrationArguments, DataArguments, RunArguments
from clipmap_hf.training.setup import source_files


__all__ = ["calibration_pairs", "choose_student", "start_compressor"]

_ORIGIN, _CHOICE = "origin.json", "choice.json"


def choose_student(
    teacher_id: str,
    revision: str | None,
    student: ClipMapConfig | None,
    calibration: CalibrationArguments | None,
    run: RunArguments,
    data: DataArguments,
) -> ClipMapConfig | None:
    """
    The student with the shape that is best within its budget, if it has one, and prints why (`choose_shape`).

    The choice is kept in `choice.json` inside `run.output_dir`, and taken from there when the same command runs again:
    a latency is never measured twice the same.

    Args:
        teacher_id: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        student: The size to make, and how its operators start.
        calibration: The pairs to choose by, if the student starts from pairs; `None` to choose without.
        run: Its seed draws them.
        data: The training pairs, and how they are read.
    """
    if student is None or student.budget is None:
        return student
    state, path = join_processes(), Path(run.output_dir) / _CHOICE
    by_pairs = calibration is not None and student.initializer in (None, *NEED_PAIRS)
    origin = {"teacher": [teacher_id, revision], "student": student.to_dict()}
    if by_pairs:
        origin = _origin(teacher_id, revision, student, calibration, run, data)
    found = read_json(path) if run.resume == "auto" and path.is_file() else {"origin": None}
    if found["origin"] != origin:
        kept = None
        if by_pairs:
            teacher = load_model(teacher_id, revision=revision).to(calibration_device())
            kept = kept_energy(teacher, calibration_pairs(teacher_id, revision, calibration, run, data))
        choice = choose_shape(load_config(teacher_id, revision=revision), student, kept)
        found = {"origin": origin, "student": choice.config.to_dict(), "explanation": str(choice)}
        state.wait_for_everyone()  # none may look for what another writes
        if state.is_main_process:
            write_json(path, found)
    state.print(found["explanation"])
    return ClipMapConfig.from_dict(found["student"])


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
        student: The size to make, or what it may cost (`choose_student`), and how its operators start.
        calibration: The pairs to start from.
        run: Its seed draws them.
        data: The training pairs, and how they are read.
    """
    student = choose_student(teacher_id, revision, student, calibration, run, data)
    if student is None or student.initializer not in (None, *NEED_PAIRS):
        return ClipMapCompressor.from_pretrained(teacher_id, student, revision=revision, backend=data.image_backend)
    state, folder = join_processes(), Path(run.output_dir) / "start"
    origin = _origin(teacher_id, revision, student, calibration, run, data)
    if run.resume == "auto" and (folder / _ORIGIN).is_file() and read_json(folder / _ORIGIN) == origin:
        return ClipMapCompressor.from_pretrained(folder, backend=data.image_backend)
    batches = calibration_pairs(teacher_id, revision, calibration, run, data)
    compressor = ClipMapCompressor.from_pretrained(
        teacher_id, student, calibration_data=batches, revision=revision, backend=data.image_backend
    )
    state.wait_for_everyone()  # none may look for what another writes
    if state.is_main_process:
        (folder / _ORIGIN).unlink(missing_ok=True)  # it may be that of another start
        compressor.save_pretrained(folder)
        write_json(folder / _ORIGIN, origin)
    return compressor


def _origin(
    teacher_id: str,
    revision: str | None,
    student: ClipMapConfig,
    calibration: CalibrationArguments,
    run: RunArguments,
    data: DataArguments,
) -> dict[str, Any]:
    """All that decides what is made from calibration pairs."""
    return {
        "teacher": [teacher_id, revision],
        "weights": _digests(Path(teacher_id)),
        "student": student.to_dict(),
        "calibration": dataclasses.asdict(calibration),
        "data": source_files(_calibration_source(calibration, data))
        | {"caption_column": data.caption_column, "streaming": data.streaming, "image_backend": data.image_backend},
        "seed": run.seed,
    }


def _digests(folder: Path) -> dict[str, str]:
    """What tells the weights in a local folder from others; those on the Hub have a revision."""
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _calibration_source(calibration: CalibrationArguments, data: DataArguments) -> DataArguments:
    return dataclasses.replace(data, train_data=calibration.calibration_data or data.train_data)


def calibration_pairs(
    teacher_id: str, revision: str | None, calibration: CalibrationArguments, run: RunArguments, data: DataArguments
) -> CalibrationPairs:
    """
    The pairs that a run calibrates on, or scores by: some of `calibration_data`, or else of the training pairs.

    Args:
        teacher_id: Hub id or folder of the model that reads them.
        revision: Branch, tag or commit on the Hub.
        calibration: How many, and where they come from.
        run: Its seed draws them.
        data: The training pairs, and how they are read.
    """
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
