"""From a teacher's config and a `ClipMapConfig` to the student's config."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from clipmap_hf.config.clipmap_config import ClipMapConfig, TowerConfig
from clipmap_hf.config.presets import presets_of
from clipmap_hf.config.resnet import ResNetTowerConfig


if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["cut_towers", "embedding_width", "size_of_kind", "student_config", "tower_kind"]


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
        size = size_of_kind(getattr(config, name), tower, name).resolve(tower, name, config.head_rule)
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

    def size(config: PretrainedConfig, name: str) -> list[Any]:
        tower = getattr(config, f"{name}_config")
        return [
            embedding_width(config),
            *(getattr(tower, field.name) for field in dataclasses.fields(tower_kind(tower))),
        ]

    return tuple(tower for tower in ("vision", "text") if size(teacher, tower) != size(student, tower))


def tower_kind(tower: PretrainedConfig) -> type[TowerConfig] | type[ResNetTowerConfig]:
    """Returns the class of what says how large such a tower is."""
    return TowerConfig if hasattr(tower, "intermediate_size") else ResNetTowerConfig


def size_of_kind(
    size: TowerConfig | ResNetTowerConfig, tower: PretrainedConfig, name: str
) -> TowerConfig | ResNetTowerConfig:
    """
    Returns a size, after a check that it says what such a tower has; one that says nothing is one of any kind.

    Args:
        size: What was given.
        tower: The config of the teacher's tower.
        name: `vision` or `text`, for errors.

    Raises:
        ValueError: If the size is that of a tower of another kind.
    """
    kind = tower_kind(tower)
    given = [field for field, value in dataclasses.asdict(size).items() if value is not None]
    if not isinstance(size, kind) and given:
        allowed = [field.name for field in dataclasses.fields(kind)]
        raise ValueError(
            f"{name} is given by {given}, but the teacher's {name} tower is of another kind, whose size is given by "
            f"{allowed} (a {kind.__name__}). Its presets are {presets_of(kind)}."
        )
    return size if isinstance(size, kind) else kind()
