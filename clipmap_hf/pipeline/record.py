"""The record of what a finished student was made from, by which the same command knows that it is there."""

from clipmap_hf.distributed import join_processes
from clipmap_hf.files.atomic import read_json, write_json
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import step_count


__all__ = ["made_by", "mark_as_made"]

_RECORD = "made_from.json"


def made_by(context: RunContext, last_stage: StageArguments) -> bool:
    """
    Whether the output folder holds the finished student of a run, so that what comes before its last stage need not be
    made again.

    Args:
        context: The run; its `origin` is all that decides what the last stage begins with.
        last_stage: Its numbers; if it has steps, its last checkpoint must be there, from which it goes on.
    """
    path = context.output_dir / _RECORD
    if context.run.resume != "auto" or not path.is_file() or read_json(path) != context.origin:
        return False
    has_checkpoints = any((context.output_dir / "checkpoints").glob("step-*"))
    return has_checkpoints or step_count(last_stage, context.pairs) == 0


def mark_as_made(context: RunContext) -> None:
    """Writes the record of a finished student."""
    if join_processes().is_main_process:
        write_json(context.output_dir / _RECORD, context.origin)
