"""The size of a ResNet tower of a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ResNetTowerConfig", "fitting_widths"]


@dataclass(frozen=True)
class ResNetTowerConfig:
    """
    The size of a ResNet tower. What is left out stays as in the teacher.

    Args:
        width: Channels behind the stem; those of RN50 are 64.
        layers: Bottlenecks of each of the four stages. The first of a stage always stays.
    """

    width: int | None = None
    layers: Sequence[int] | None = None

    def resolve(self, teacher: PretrainedConfig, name: str, rule: str = "whole") -> ResNetTowerConfig:
        """
        Fills in what was left out.

        Args:
            teacher: The config of the teacher's tower.
            name: `vision`, for errors.
            rule: Not used; heads are as wide as the teacher's.

        Raises:
            ValueError: If the tower cannot be cut from this teacher; the message says what can.
        """
        width = teacher.width if self.width is None else self.width
        fitting = fitting_widths(teacher)
        if type(width) is not int or width not in fitting:
            raise ValueError(
                f"{name}.width={width!r} does not fit the teacher; it must be even, no larger than the teacher's "
                f"{teacher.width}, and 32 times it a multiple of the heads' {teacher.head_width} channels. Those that "
                f"are so are {fitting}."
            )
        layers = teacher.layers if self.layers is None else list(self.layers)
        fits = len(layers) == len(teacher.layers) and all(type(one) is int for one in layers)
        if not fits or not all(1 <= one <= largest for one, largest in zip(layers, teacher.layers, strict=True)):
            raise ValueError(
                f"{name}.layers={layers} does not fit the teacher; it must be a number of blocks for each of its "
                f"{len(teacher.layers)} stages, from 1 to the teacher's {teacher.layers}."
            )
        return ResNetTowerConfig(width, layers)


def fitting_widths(teacher: PretrainedConfig) -> list[int]:
    """Lists the widths that a student of a ResNet may have: half of one is the stem's, and 32 times it are heads."""
    return [width for width in range(2, teacher.width + 1, 2) if width * 32 % teacher.head_width == 0]
