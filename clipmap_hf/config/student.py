"""From a teacher's config and a `ClipMapConfig` to the student's config."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

from clipmap_hf.config.clipmap_config import ClipMapConfig, TowerConfig


if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["cut_towers", "embedding_width", "student_config"]


def student_config(teacher: PretrainedConfig, config: ClipMapConfig) -> PretrainedConfig:
    """
    The student's config: a copy of the teacher's with other sizes; everything else (activation, token ids, image
    size, epsilon) is kept.

    Args:
        teacher: The teacher's config.
        config: The sizes.

    Raises:
        ValueError: If the sizes do not fit the teacher, or are still to be searched.
    """
    if config.budget is not None:
        raise ValueError(
            f"The sizes within the budget {config.budget} are still to be chosen: clipmap_hf.shapes.choose_shape does "
            "it, and ClipMapCompressor.from_pretrained calls that."
        )
    student = copy.deepcopy(teacher)
    largest = embedding_width(teacher)
    projection_dim = largest if config.projection_dim is None else config.projection_dim
    if not isinstance(projection_dim, int) or not 1 <= projection_dim <= largest:
        raise ValueError(f"projection_dim={projection_dim!r} must be an integer from 1 to the teacher's {largest}.")
    has_projections = hasattr(teacher, "projection_dim")
    for name in ("vision", "text"):
        tower = getattr(student, f"{name}_config")
        size = getattr(config, name).resolve(tower, name, config.head_rule)
        for attribute, value in dataclasses.asdict(size).items():
            setattr(tower, attribute, value)
        if has_projections:
            tower.projection_dim = projection_dim  # the single-tower classes read it from here
        tower.validate()
    if has_projections:
        student.projection_dim = projection_dim
    else:
        student.text_config.projection_size = embedding_width(student)
        if config.projection_dim not in (None, embedding_width(student)):
            raise ValueError(
                f"projection_dim={projection_dim}, but in a model of type {teacher.model_type!r} images have no "
                f"projection: their embedding is as wide as the vision tower, {embedding_width(student)}. Leave "
                "projection_dim out."
            )
    return student


def embedding_width(config: PretrainedConfig) -> int:
    """Returns the width of a model's joint embedding. SigLIP projects no images: there it is the vision tower's."""
    return getattr(config, "projection_dim", config.vision_config.hidden_size)


def cut_towers(teacher: PretrainedConfig, student: PretrainedConfig) -> tuple[str, ...]:
    """Names the towers, `vision` or `text`, that are smaller in the student; the joint embedding belongs to both."""
    sizes = [field.name for field in dataclasses.fields(TowerConfig)]

    def size(config: PretrainedConfig, tower: str) -> list[int]:
        return [embedding_width(config), *(getattr(getattr(config, f"{tower}_config"), name) for name in sizes)]

    return tuple(tower for tower in ("vision", "text") if size(teacher, tower) != size(student, tower))
