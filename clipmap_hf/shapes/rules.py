"""By what a shape is better than another: scores of both towers' shapes, which add up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from clipmap_hf.shapes.grid import Grid, Shape, Table


__all__ = ["LITERATURE", "Rule", "energy_rule", "literature_rule"]

# Width and depth of the vision tower, then of the text tower, as shares of the teacher's: CLIP-Map's students of
# ViT-B/16 (`PRESETS`), the upper two of which are TinyCLIP's ViT-8M/16 and ViT-39M/16 too, and its ViT-61M/32.
LITERATURE = (
    (1 / 6, 1 / 3, 1 / 4, 1 / 6),
    (1 / 3, 5 / 6, 1 / 2, 1 / 4),
    (2 / 3, 1, 1, 1 / 2),
    (5 / 6, 1, 1, 3 / 4),
    (1, 1, 1, 1),
)


@dataclass(frozen=True)
class Rule:
    """
    Scores, and how they are explained.

    Args:
        scores: Of each tower's shapes; that of a student is the sum, and the highest is best.
        column: What a table of candidates calls them.
        shown: How it writes one.
        why: What is best by them, a sentence.
    """

    scores: Table
    column: str
    shown: Callable[[float], str]
    why: str


def literature_rule(teacher: PretrainedConfig, grid: Grid, costs: Table, limit: float) -> Rule:
    """
    Without data: how near a shape comes to those of the literature (`LITERATURE`).

    With `s` the four sizes (width and depth of both towers) and `t(budget)` the target, the score is

        − Σᵢ (log sᵢ − log tᵢ)²,

    where `log t` is piecewise linear in the logarithm of the cost, through the shapes of the literature as they would
    be cut from this teacher and the smallest shape of the grid. At the cost of one of them, it is the target.

    Args:
        teacher: The teacher's config.
        grid: The shapes.
        costs: Of each tower's shapes.
        limit: What both may cost together.
    """
    points = {}
    for shares in ((0, 0, 0, 0), *LITERATURE):
        places, cost = [], 0.0
        for name, of_width, of_depth in (("vision", *shares[:2]), ("text", *shares[2:])):
            tower = getattr(teacher, f"{name}_config")
            width = _nearest(grid[name].widths, of_width * tower.hidden_size)
            depth = _nearest(grid[name].depths, of_depth * tower.num_hidden_layers)
            places += [grid[name].widths[width], grid[name].depths[depth]]
            cost += float(costs[name][width, depth])
        points[cost] = Shape(*places)
    at = np.log(sorted(points))
    sizes = np.log([points[cost] for cost in sorted(points)])
    target = Shape(*(float(np.interp(math.log(limit), at, one)) for one in sizes.T))
    scores = {}
    for name, width, depth in (("vision", *target[:2]), ("text", *target[2:])):
        widths, depths = (
            torch.tensor(one, dtype=torch.float64).log() for one in (grid[name].widths, grid[name].depths)
        )
        scores[name] = -((widths - width)[:, None] ** 2) - (depths - depth) ** 2
    near = Shape(*map(math.exp, target))
    why = (
        "The first is nearest to the shapes of the literature, interpolated at this cost: vision "
        f"{near.vision_width:.0f} × {near.vision_depth:.1f}, text {near.text_width:.0f} × {near.text_depth:.1f}."
    )
    return Rule(scores, "distance", lambda score: f"{math.sqrt(max(0.0, -score)):.3f}", why)


def energy_rule(grid: Grid, kept: Mapping[str, torch.Tensor], head_widths: Mapping[str, int]) -> Rule:
    """
    With calibration data: the product of what both towers keep by `kept_energy`; the score is its logarithm.

    Args:
        grid: The shapes.
        kept: As `kept_energy` gives it.
        head_widths: Of each tower.
    """
    scores = {}
    for name, tower in grid.items():
        heads = torch.tensor(tower.widths) // head_widths[name] - 1
        scores[name] = kept[name][heads][:, torch.tensor(tower.depths) - 1].log()
    return Rule(
        scores,
        "kept",
        lambda score: f"{math.exp(score):.1%}",
        "The first keeps most of what the teacher's layers do to their streams, vision times text.",
    )


def _nearest(values: tuple[int, ...], wanted: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))
