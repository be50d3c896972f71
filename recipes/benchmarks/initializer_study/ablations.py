"""The ingredients of a calibrated start, each left out by putting something plainer in its place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from clipmap_hf.mapping.initializers import CALIBRATED_INITIALIZERS
from clipmap_hf.mapping.initializers.calibrated import calibrated
from clipmap_hf.mapping.scores import selection


def first(energy: torch.Tensor, count: int) -> torch.Tensor:
    """The first entries instead of the strongest."""
    return torch.arange(count).expand(*energy.shape[:-1], count)


def first_of_segment(energy: torch.Tensor, segment: range, count: int) -> dict[int, torch.Tensor]:
    """The first entries of a segment's first layer."""
    return {segment.start: torch.arange(count)}


def patches_as_residual(statistics, teacher, student) -> dict[str, torch.Tensor]:
    """The vision embeddings are mapped as what they are normalized to."""
    operators = calibrated(statistics, teacher, student)
    return operators | {"vision_patch": operators["vision_residual"]}


def not_folded(tensors, family):
    """LayerNorm scales and shifts stay where they are."""
    return dict(tensors)


def nothing(*arguments) -> None:
    """Leaves things as they are."""


_CALIBRATED = "clipmap_hf.mapping.initializers.calibrated"
_START = "clipmap_hf.mapping.start"
# Of each ingredient, what stands in whose place.
REPLACEMENTS = {
    "fold": {
        "clipmap_hf.mapping.mapper.fold": not_folded,
        f"{_START}.fold": not_folded,
        f"{_START}.gains_and_shifts": nothing,  # the scales are mapped as all that writes the stream
    },
    "fold of pre_layrnorm": {f"{_START}.set_pre_layrnorm": nothing},
    "gains": {f"{_CALIBRATED}._gain": lambda residual, moment: 1.0},
    "lifts": {f"{_CALIBRATED}._lifts": lambda moments, kept: selection(kept, len(moments[0].mean))},
    "energy": {
        f"{_CALIBRATED}.strongest": first,
        "clipmap_hf.mapping.refit._strongest_of": first_of_segment,
    },
    "gradient steps of whole towers": {"clipmap_hf.mapping.refit._TowerRefit.descend": nothing},
    "weight of the pooled token": {"clipmap_hf.mapping.calibration.POOLED_WEIGHT": 1.0},
}


@contextmanager
def without(ingredient: str | None) -> Iterator[None]:
    """Leaves out an ingredient; `None` leaves out none."""
    with ExitStack() as stack:
        for target, replacement in REPLACEMENTS.get(ingredient, {}).items():
            stack.enter_context(patch(target, replacement))
        if ingredient == "fold of pre_layrnorm":
            stack.enter_context(patch.dict(CALIBRATED_INITIALIZERS, calibrated=patches_as_residual))
        yield
