"""What a run begins with: a student's shape, and a compressor or student that may be taken up from an earlier run."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.config.json_values import json_values
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.data.held_batches import HeldBatches
from clipmap_hf.data.sources import described, source_files
from clipmap_hf.distributed import calibration_device, join_processes
from clipmap_hf.families import family_for
from clipmap_hf.files.atomic import read_json, write_json
from clipmap_hf.hub.map_folder import find_map
from clipmap_hf.models.loading import load_model
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.shapes import search_shape
from clipmap_hf.starts import STARTS, default_start, start_of, uses_pairs


__all__ = [
    "choose_student",
    "load_map",
    "remove_start",
    "start_compressor",
    "start_origin",
    "start_student",
    "teacher_of",
]

_FOLDER, _ORIGIN, _CHOICE = "start", "origin.json", "choice.json"


def choose_student(
    source: ModelId, student: ClipMapConfig, context: RunContext, calibration: CalibrationArguments | None
) -> ClipMapConfig:
    """
    The student with the shape that is best within its budget, if it has a budget, and prints why (`search_shape`).

    The choice is kept in `choice.json` inside the output folder, and taken from there when the same command runs
    again: a latency is never measured twice the same.

    Args:
        source: The model to compress.
        student: The size to make, and how its operators start.
        context: The run.
        calibration: The pairs to choose by, if the student starts from pairs; `None` to choose without.
    """
    if student.budget is None:
        return student
    state, path = join_processes(), context.output_dir / _CHOICE
    by_pairs = calibration is not None and _reads_pairs(source, student, context)
    origin = start_origin(source, student, context, calibration if by_pairs else None)
    found = read_json(path) if context.run.resume == "auto" and path.is_file() else {"origin": None}
    if found["origin"] != origin:
        teacher, batches = context.teacher(source), None
        if by_pairs:
            teacher.model.to(calibration_device())
            batches = _calibration_batches(teacher, student, context, calibration)
        choice = search_shape(teacher.model, student, batches)
        found = {"origin": origin, "student": choice.config.to_dict(), "explanation": str(choice)}
        state.wait_for_everyone()  # none may look for what another writes
        if state.is_main_process:
            write_json(path, found)
    state.print(found["explanation"])
    return ClipMapConfig.from_dict(found["student"])


def start_compressor(
    source: ModelId, student: ClipMapConfig | None, context: RunContext, calibration: CalibrationArguments
) -> ClipMapCompressor:
    """
    Starts to compress a teacher, from calibration data if `student` allows it. Without `student`, goes on with a map.

    A start that reads pairs, be it only to measure BatchNorms, is kept in `start/` inside the output folder, with its
    map, and taken from there when the same command runs again; `remove_start` ends that.

    Args:
        source: Hub id or folder of the teacher, or of a map to go on with.
        student: The size to make, or what it may cost (`choose_student`), and how its operators start.
        context: The run.
        calibration: The pairs to start from.
    """
    if student is None:
        return load_map(source, context)
    student = choose_student(source, student, context, calibration)
    if not _uses_pairs(source, student, context):
        return ClipMapCompressor.from_teacher(context.teacher(source), _named(source, student, context))
    kept = _KeptStart(context, start_origin(source, student, context, calibration))
    if kept.is_there("map"):
        return load_map(ModelId(str(kept.folder)), context)
    compressor = _calibrated_compressor(source, student, context, calibration)
    kept.write(compressor.save_pretrained)
    return compressor


def start_student(
    source: ModelId, student: ClipMapConfig | None, context: RunContext, calibration: CalibrationArguments
) -> PreTrainedModel:
    """
    The student that `start_compressor` exports, for a run that does not train its operators: what is kept in `start/`
    is the student alone, without the map.
    """
    if student is not None:
        student = choose_student(source, student, context, calibration)
        if _uses_pairs(source, student, context):
            kept = _KeptStart(context, start_origin(source, student, context, calibration))
            if kept.is_there("model.safetensors"):
                return load_model(str(kept.folder))
            compressor = _calibrated_compressor(source, student, context, calibration)
            kept.write(lambda folder: compressor.save_pretrained(folder, include_map=False))
            return compressor.export()
    return start_compressor(source, student, context, calibration).export()


def teacher_of(source: ModelId, student: ClipMapConfig | None, context: RunContext) -> Teacher:
    """The model that a student is made of: `source`, or without `student` the teacher of the map that lies there."""
    if student is not None:
        return context.teacher(source)
    _, content = find_map(source.id, source.revision)
    return context.teacher(ModelId(content["teacher"], content["teacher_revision"]))


def load_map(source: ModelId, context: RunContext) -> ClipMapCompressor:
    """The compressor whose map lies in the folder or repository `source`, by a teacher that is loaded once."""
    return ClipMapCompressor.from_map(source, lambda *teacher: context.teacher(ModelId(*teacher)))


def remove_start(context: RunContext) -> None:
    """Removes what `start_compressor` and `start_student` keep for a run, when the run is finished."""
    state = join_processes()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(context.output_dir / _FOLDER, ignore_errors=True)


def start_origin(
    source: ModelId, student: ClipMapConfig | None, context: RunContext, calibration: CalibrationArguments | None
) -> dict[str, Any]:
    """
    All that decides how a student starts, as JSON values.

    Args:
        source: The model to compress, or the map to go on with.
        student: Its size and how its operators start; `None` for a map.
        context: The run.
        calibration: The pairs that a start reads; `None` if there are none.
    """
    folder = Path(source.id)
    name = folder.resolve().name if folder.is_dir() else source.id  # its weights say which folder it is
    origin = {"teacher": [name, source.revision], "weights": _digests(folder)}
    if student is None:
        return origin
    origin["student"] = student.to_dict()
    if calibration is not None and _uses_pairs(source, student, context):
        data, given = context.data, calibration.calibration_data
        named = dataclasses.replace(calibration, calibration_data=given and described(given))
        origin["calibration"] = json_values(named)
        origin["data"] = source_files(data, given) | {
            "caption_column": data.caption_column,
            "keyword_column": data.keyword_column,
            "caption_sampling": data.sampling,
            "mix": data.mix,
            "streaming": data.streaming,
            "image_backend": data.image_backend,
        }
        origin["data"] |= {"texts": data.texts.digest} if data.texts is not None else {}
        origin["seed"] = context.run.seed
    return origin


@dataclass(frozen=True)
class _KeptStart:
    """The folder in which a start is kept while its run lasts."""

    context: RunContext
    origin: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.context.output_dir / _FOLDER

    def is_there(self, name: str) -> bool:
        """Whether a start of this origin was written to its end, with something of this name."""
        path = self.folder / _ORIGIN
        is_wanted = self.context.run.resume == "auto" and path.is_file() and read_json(path) == self.origin
        return is_wanted and (self.folder / name).exists()

    def write(self, save: Callable[[Path], None]) -> None:
        """Lets the main process save a start."""
        state = join_processes()
        state.wait_for_everyone()  # none may look for what another writes
        if state.is_main_process:
            (self.folder / _ORIGIN).unlink(missing_ok=True)  # it may be that of another start
            save(self.folder)
            write_json(self.folder / _ORIGIN, self.origin)


def _named(source: ModelId, student: ClipMapConfig, context: RunContext) -> ClipMapConfig:
    """The student with the start that a run, which has pairs, takes if it names none."""
    if student.initializer:
        return student
    family = family_for(context.teacher(source).model.config)
    return dataclasses.replace(student, initializer=default_start(family, has_pairs=True))


def _reads_pairs(source: ModelId, student: ClipMapConfig, context: RunContext) -> bool:
    """Whether a student starts from pairs."""
    return start_of(_named(source, student, context)).reads_pairs


def _uses_pairs(source: ModelId, student: ClipMapConfig, context: RunContext) -> bool:
    """Whether a student begins with pairs: those that start from them, and others with BatchNorms."""
    if _reads_pairs(source, student, context):
        return True
    return uses_pairs(student, family_for(context.teacher(source).model.config))


def _calibrated_compressor(
    source: ModelId, student: ClipMapConfig, context: RunContext, calibration: CalibrationArguments
) -> ClipMapCompressor:
    student = _named(source, student, context)
    if start_of(student).matches and not context.data.paired:
        others = sorted(name for name, start in STARTS.items() if not start.matches)
        raise ValueError(
            f"initializer={student.initializer!r} needs texts that belong to their images, and not all of these do. "
            f"Take one of {others}, or give pairs alone, without train_images and train_texts."
        )
    teacher = context.teacher(source)
    batches = _calibration_batches(teacher, student, context, calibration)
    compressor = ClipMapCompressor.from_teacher(teacher, student, batches)
    context.release_calibration()
    return compressor


def _calibration_batches(
    teacher: Teacher, student: ClipMapConfig, context: RunContext, calibration: CalibrationArguments
) -> HeldBatches:
    compares_pairs = start_of(student).matches
    return context.calibration_batches(teacher, calibration, once=compares_pairs)


def _digests(folder: Path) -> dict[str, str]:
    """What tells the weights in a local folder from others; those on the Hub have a revision."""
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
