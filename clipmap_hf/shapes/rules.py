"""Rules that score shapes, so that the best shape within a budget can be chosen; both towers' scores add up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from clipmap_hf.config import ResNetTowerConfig
from clipmap_hf.config.student import tower_kind
from clipmap_hf.shapes.grid import Grid, Shape, Table


__all__ = ["LITERATURE", "OF_RESNETS", "Rule", "energy_rule", "literature_rule"]

# Width and depth of the vision tower, then of the text tower, as shares of the teacher's: CLIP-Map's students of
# ViT-B/16 (`PRESETS`), the upper two of which are TinyCLIP's ViT-8M/16 and ViT-39M/16 too, and its ViT-61M/32.
LITERATURE = (
    (1 / 6, 1 / 3, 1 / 4, 1 / 6),
    (1 / 3, 5 / 6, 1 / 2, 1 / 4),
    (2 / 3, 1, 1, 1 / 2),
    (5 / 6, 1, 1, 3 / 4),
    (1, 1, 1, 1),
)
# The same of RN50: TinyCLIP's RN-19M and RN-30M.
OF_RESNETS = (
    (11 / 16, 1, 1, 1 / 2),
    (7 / 8, 1, 1, 3 / 4),
    (1, 1, 1, 1),
)


@dataclass(frozen=True)
class Rule:
    """
    Scores of shapes, and how they are explained.

    Args:
        scores: Scores of each tower's shapes. The score of a student is the sum over both towers. The highest score is
            the best.
        column: Header of the scores in a table of candidates.
        shown: Function that formats a score for the table.
        why: A sentence that explains which shape is the best.
    """

    scores: Table
    column: str
    shown: Callable[[float], str]
    why: str


def literature_rule(teacher: PretrainedConfig, grid: Grid, costs: Table, limit: float) -> Rule:
    """
    Scores shapes without data: the score is the higher, the nearer a shape is to the shapes of the literature
    (`LITERATURE`, of ResNets `OF_RESNETS`).

    With `s` the four sizes (width and depth of both towers) and `t(budget)` the target, the score is

        − Σᵢ (log sᵢ − log tᵢ)²,

    where `log t` is piecewise linear in the logarithm of the cost. It passes through the smallest shape of the grid
    and through the shapes of the literature, cut from this teacher. So at the cost of such a shape, the target is the
    shape itself.

    Args:
        teacher: The teacher's config.
        grid: The shapes.
        costs: Costs of each tower's shapes.
        limit: The most that both towers may cost together.
    """
    points = {}
    is_resnet = tower_kind(teacher.vision_config) is ResNetTowerConfig
    for shares in ((0, 0, 0, 0), *(OF_RESNETS if is_resnet else LITERATURE)):
        places, cost = [], 0.0
        for name, width_share, depth_share in (("vision", *shares[:2]), ("text", *shares[2:])):
            tower = getattr(teacher, f"{name}_config")
            largest = tower.width if is_resnet and name == "vision" else tower.hidden_size
            width = _find_nearest(grid[name].widths, width_share * largest)
            depth = _find_nearest(grid[name].depths, depth_share * tower.num_hidden_layers)
            places += [grid[name].widths[width], grid[name].depths[depth]]
            cost += float(costs[name][width, depth])
        points[cost] = Shape(*places)
    log_costs = np.log(sorted(points))
    log_sizes = np.log([points[cost] for cost in sorted(points)])
    target = Shape(*(float(np.interp(math.log(limit), log_costs, column)) for column in log_sizes.T))
    scores = {}
    for name, width, depth in (("vision", *target[:2]), ("text", *target[2:])):
        widths, depths = (
            torch.tensor(sizes, dtype=torch.float64).log() for sizes in (grid[name].widths, grid[name].depths)
        )
        scores[name] = -((widths - width)[:, None] ** 2) - (depths - depth) ** 2
    nearest = Shape(*map(math.exp, target))
    why = (
        "The first is nearest to the shapes of the literature, interpolated at this cost: vision "
        f"{nearest.vision_width:.0f} × {nearest.vision_depth:.1f}, text {nearest.text_width:.0f} × "
        f"{nearest.text_depth:.1f}."
    )
    return Rule(scores, "distance", lambda score: f"{math.sqrt(max(0.0, -score)):.3f}", why)


def energy_rule(grid: Grid, kept: Mapping[str, torch.Tensor], head_widths: Mapping[str, int]) -> Rule:
    """
    Scores shapes with calibration data: the score is the logarithm of the product of what both towers keep.

    Args:
        grid: The shapes.
        kept: The result of `kept_energy`.
        head_widths: Head width of each of the teacher's towers. A width counts as that of the whole heads in it.
    """
    scores = {}
    for name, tower in grid.items():
        heads = (torch.tensor(tower.widths) // head_widths[name]).clamp(min=1) - 1
        scores[name] = kept[name][heads][:, torch.tensor(tower.depths) - 1].log()
    return Rule(
        scores,
        "kept",
        lambda score: f"{math.exp(score):.1%}",
        "The first keeps most of what the teacher's layers do to their streams, vision times text.",
    )


def _find_nearest(values: tuple[int, ...], wanted: float) -> int:
    """Returns the index of the value that is nearest to `wanted`."""
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))
