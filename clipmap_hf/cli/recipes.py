"""The arguments that recipes share, listed once, so that they read the same YAML files."""

from typing import Any

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import optional, parse_arguments
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.labels import LabelArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import (
    DistillationStageArguments,
    MappingStageArguments,
    MaskingStageArguments,
    StageArguments,
)
from clipmap_hf.training.run_arguments import RunArguments


__all__ = ["COMPRESSION_STAGES", "SHARED", "STAGES", "parse_recipe"]

# Top-level keys of a recipe's YAML, and its sections. What a recipe does not use, it leaves alone. Two recipes
# parse all of `SHARED`, and unpack them in this order.
SHARED = (
    DataArguments,
    TeacherArguments,
    TeacherCacheArguments,
    StudentArguments,
    CalibrationArguments,
    RunArguments,
)
STAGES = {
    "masking": MaskingStageArguments,
    "mapping": MappingStageArguments,
    "distillation": DistillationStageArguments,
}
# Of recipes that do everything: masks and mapping are left out unless they are asked for.
COMPRESSION_STAGES = STAGES | {name: optional(STAGES[name]) for name in ("masking", "mapping")}


def parse_recipe(
    *types: type, stages: dict[str, type] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Reads the arguments of a recipe from the command line and from `--config file.yaml`; the command line wins.

    Args:
        types: Dataclasses of its options. The keys of those of `SHARED`, and of labels, that are not among them are
            left alone.
        stages: Dataclasses of its YAML sections. Those of `STAGES` that are not among them are checked, and left
            alone.
        description: Shown by `--help`.

    Returns:
        An instance of each type, then of each stage, which has its losses: of those that are not named, the default.

    Raises:
        ValueError: If the YAML file has a key that no dataclass knows.
    """
    stages = stages or {}
    parsed = parse_arguments(
        *types,
        stages=stages,
        others=tuple(kind for kind in (*SHARED, LabelArguments) if kind not in types),
        other_stages={name: stage for name, stage in STAGES.items() if name not in stages},
        description=description,
    )
    listed = any(values.labels is not None for values in parsed if isinstance(values, LabelArguments))
    data = [values for values in parsed if isinstance(values, DataArguments)]
    if not listed:
        for values in data:
            values.name_texts()
    paired = all(values.paired for values in data)
    return tuple(  # masks and mapping do not go with labels
        values.for_texts(paired, listed and type(values) is DistillationStageArguments)
        if isinstance(values, StageArguments)
        else values
        for values in parsed
    )
