"""The mapping stage: from a model and arguments to a written student with its map."""

from pathlib import Path
from typing import Any

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.distributed import join_processes
from clipmap_hf.losses import PAIR_LOSSES
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.record import made_by, mark_as_made
from clipmap_hf.pipeline.stage import evaluation_function, evaluation_results, run_stage
from clipmap_hf.pipeline.start import load_map, remove_start, start_compressor, start_origin
from clipmap_hf.training.arguments import MappingArguments
from clipmap_hf.training.stages.mapping import MappingStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["map_model", "run_mapping"]


def map_model(
    source: ModelId,
    student: ClipMapConfig | None,
    context: RunContext,
    *,
    calibration: CalibrationArguments,
    mapping: MappingArguments,
) -> TrainResult:
    """
    Starts to compress a model, trains the operators, and writes the student with its map to the output folder. What
    the start leaves in `start/` is removed at the end.

    Args:
        source: The model; or, without `student`, a folder with a map to go on with.
        student: The size to make, and how its operators start.
        context: The run.
        calibration: The pairs to start from.
        mapping: The stage's numbers.
    """
    origin = start_origin(source, student, context, calibration)
    if made_by(context, origin, mapping):
        compressor = load_map(ModelId(str(context.output_dir)), context)
    else:
        compressor = start_compressor(source, student, context, calibration)
    join_processes().print(compressor.cost())
    result = run_mapping(compressor, mapping, context, origin=origin)
    mark_as_made(context, origin)
    remove_start(context)
    return result


def run_mapping(
    compressor: ClipMapCompressor,
    arguments: MappingArguments,
    context: RunContext,
    *,
    origin: dict[str, Any] | None = None,
) -> TrainResult:
    """
    Trains a compressor's operators and writes the mapped student, with its map, to the output folder.

    Args:
        compressor: Trained in place.
        arguments: The stage's numbers.
        context: The run.
        origin: All that decides how the operators start, as JSON values; a checkpoint of another origin is refused.
    """
    teacher = ModelId(compressor.teacher_id, compressor.teacher_revision)
    distills = set(arguments.losses) - set(PAIR_LOSSES)
    stage = MappingStage(
        compressor.mapper,
        teachers=[context.teacher(teacher).model] if distills else [],
        losses=arguments.losses,
        logit_scale=arguments.logit_scale,
        learn_logit_scale=arguments.learn_logit_scale,
    )

    def save(folder: Path, metrics: dict[str, float]) -> None:
        compressor.save_pretrained(folder, results=evaluation_results(context.data, metrics), recipe=context.recipe)

    return run_stage(
        stage,
        arguments,
        context,
        compressor.processor,
        name="mapping",
        evaluate=evaluation_function(context, compressor.processor),
        save=save,
        config={"teachers": [list(teacher)], "student": compressor.map_config.to_dict(), "origin": origin},
    )
