"""The ingredients of a calibrated start, each left out by putting something plainer in its place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from clipmap_hf.starts.calibrated.operators import calibrated_operators
from clipmap_hf.starts.selection.scores import selection


def first(energy: torch.Tensor, count: int) -> torch.Tensor:
    """Keeps the first entries instead of the strongest."""
    return torch.arange(count).expand(*energy.shape[:-1], count)


def first_of_segment(refit, part: str, segment: range, count: int) -> torch.Tensor:
    """Keeps the first entries of a segment."""
    return torch.arange(count)


def patches_as_residual(statistics, teacher, student) -> dict[str, torch.Tensor]:
    """Maps the vision embeddings as what they are normalized to."""
    operators = calibrated_operators(statistics, teacher, student)
    return operators | {"vision_patch": operators["vision_residual"]}


def not_folded(tensors, family):
    """Leaves LayerNorm scales and shifts where they are."""
    return dict(tensors)


def nothing(*arguments) -> None:
    """Leaves things as they are."""


_CALIBRATED = "clipmap_hf.starts.calibrated"
# Of each ingredient, what stands in whose place.
REPLACEMENTS = {
    "fold": {
        "clipmap_hf.mapping.plan.fold": not_folded,
        f"{_CALIBRATED}.start.set_gains_and_shifts": nothing,  # the scales are mapped as all that writes the stream
    },
    "fold of pre_layrnorm": {
        f"{_CALIBRATED}.start.set_pre_layrnorm": nothing,
        f"{_CALIBRATED}.start.calibrated_operators": patches_as_residual,
    },
    "gains": {f"{_CALIBRATED}.norms._gain": lambda residual, moment: 1.0},
    "lifts": {
        f"{_CALIBRATED}.operators._lifts": lambda moments, kept: selection(kept, len(moments[0].mean)),
        f"{_CALIBRATED}.operators._head_lifts": lambda moments, operators: operators,
    },
    "energy": {
        f"{_CALIBRATED}.operators.strongest": first,
        f"{_CALIBRATED}.refit._TowerRefit._strongest": first_of_segment,
        f"{_CALIBRATED}.refit.most_needed": lambda moments, count: torch.arange(count),
    },
    "streams in gradient steps": {f"{_CALIBRATED}.refit.watched_layers": lambda count: ()},
    "weight of the pooled token": {f"{_CALIBRATED}.statistics.POOLED_WEIGHT": 1.0},
}


@contextmanager
def without(ingredient: str | None) -> Iterator[None]:
    """Leaves out an ingredient; `None` leaves out none."""
    with ExitStack() as stack:
        for target, replacement in REPLACEMENTS.get(ingredient, {}).items():
            stack.enter_context(patch(target, replacement))
        yield
