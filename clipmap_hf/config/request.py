"""From what a user asks for, a preset, a budget or a config, to a `ClipMapConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clipmap_hf.config.budget import Budget
from clipmap_hf.config.clipmap_config import ClipMapConfig
from clipmap_hf.config.presets import PRESETS


__all__ = ["requested_config"]


def requested_config(
    student: str | Budget | Mapping[str, Any] | ClipMapConfig, initializer: str | None
) -> ClipMapConfig:
    """
    Makes the config that a user asks for.

    Args:
        student: A key of `PRESETS`, a budget or its values by name, or a config.
        initializer: How the operators start, if the config does not say it.

    Raises:
        ValueError: If `student` is none of these, or two initializers are named.
    """
    if isinstance(student, str) and student in PRESETS:
        student = PRESETS[student]
    elif isinstance(student, (Budget, Mapping)):
        student = ClipMapConfig(budget=student)
    if not isinstance(student, ClipMapConfig):
        raise ValueError(
            f"student={student!r} is unknown; it must be one of {sorted(PRESETS)}, a budget such as "
            "{'params': '30M'}, or a ClipMapConfig."
        )
    if None not in (initializer, student.initializer) and initializer != student.initializer:
        raise ValueError(f"initializer={initializer!r}, but the student's config says {student.initializer!r}.")
    return dataclasses.replace(student, initializer=initializer or student.initializer)
