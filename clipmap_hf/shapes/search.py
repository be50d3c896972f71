"""Chooses a shape by what the teacher's layers do on calibration pairs, or without pairs by the literature."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.families import family_for
from clipmap_hf.shapes.choice import Choice, choose_shape
from clipmap_hf.shapes.energy import kept_energy
from clipmap_hf.shapes.grid import grid_of


__all__ = ["search_shape"]


def search_shape(
    teacher: PreTrainedModel, config: ClipMapConfig, batches: Iterable[Mapping[str, torch.Tensor]] | None = None
) -> Choice:
    """
    Finds the best shape within a config's budget, by `kept_energy` if there are batches and both towers have layers to
    go through. Of a ResNet, it is that of the literature in any case.

    Args:
        teacher: The model to compress. Activations are computed on its device.
        config: The config of the student, with a budget. Sizes that it gives are kept.
        batches: Batches of calibration pairs, as for `kept_energy`.

    Raises:
        ValueError: As in `choose_shape`. A given size that does not fit the teacher raises it before batches are read.
    """
    grid_of(teacher.config, config)  # checks the given sizes
    by_energy = batches is not None and family_for(teacher.config).transformers
    return choose_shape(teacher.config, config, kept_energy(teacher, batches) if by_energy else None)
