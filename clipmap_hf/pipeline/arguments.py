"""The arguments of training from Python: those of a stage, of its data and of its run, in one flat dataclass each."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from clipmap_hf.data.arguments import ReadingArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


__all__ = ["DistillationArguments", "MappingArguments", "PretrainingArguments", "TernaryArguments", "part"]

Part = TypeVar("Part")


@dataclass
class PretrainingArguments(StageArguments, ReadingArguments, RunArguments):
    """The arguments of a `PretrainingTrainer`; the names are those of transformers' `TrainingArguments`."""

    def __post_init__(self):
        _check(self, StageArguments, ReadingArguments, RunArguments)


@dataclass
class MappingArguments(MappingStageArguments, ReadingArguments, RunArguments):
    """The arguments of a `MappingTrainer`; the names are those of transformers' `TrainingArguments`."""

    def __post_init__(self):
        _check(self, MappingStageArguments, ReadingArguments, RunArguments)


@dataclass
class DistillationArguments(DistillationStageArguments, TeacherCacheArguments, ReadingArguments, RunArguments):
    """The arguments of a `DistillationTrainer`; the names are those of transformers' `TrainingArguments`."""

    def __post_init__(self):
        _check(self, DistillationStageArguments, TeacherCacheArguments, ReadingArguments, RunArguments)


@dataclass
class TernaryArguments(TernaryStageArguments, TeacherCacheArguments, ReadingArguments, RunArguments):
    """The arguments of a `TernaryTrainer`; the names are those of transformers' `TrainingArguments`."""

    def __post_init__(self):
        _check(self, TernaryStageArguments, TeacherCacheArguments, ReadingArguments, RunArguments)


def part(arguments: Any, kind: type[Part]) -> Part:
    """Returns the part of arguments that a dataclass describes, as an instance of it."""
    return kind(**{f.name: getattr(arguments, f.name) for f in fields(kind)})


def _check(arguments: Any, *parts: type) -> None:
    for kind in parts:
        kind.__post_init__(arguments)
