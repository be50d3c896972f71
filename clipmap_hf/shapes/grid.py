"""The shapes that a search compares, and their costs: a table for each tower, and both towers' costs add up."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig, student_config
from clipmap_hf.config.heads import head_width
from clipmap_hf.config.resnet import fitting_widths
from clipmap_hf.config.student import size_of_kind
from clipmap_hf.costs.cost import model_cost, parameter_count


__all__ = [
    "COUNTED",
    "Grid",
    "Shape",
    "Table",
    "TowerGrid",
    "counted_costs",
    "extend_to_depths",
    "grid_of",
    "with_kinds",
    "with_shape",
]

# The measures of a budget that can be computed from a config.
COUNTED: Mapping[str, Callable[[PretrainedConfig], int]] = {
    "params": parameter_count,
    "macs": lambda config: model_cost(config).macs,
    "bytes": lambda config: parameter_count(config) * torch.float32.itemsize,
}


class Shape(NamedTuple):
    """Width and depth of both towers."""

    vision_width: int
    vision_depth: int
    text_width: int
    text_depth: int


@dataclass(frozen=True)
class TowerGrid:
    """The widths and the depths that one tower may have, ascending."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]


Grid = dict[str, TowerGrid]  # for `vision` and `text`
Table = dict[str, torch.Tensor]  # for `vision` and `text`, values `(widths, depths)` of the tower's grid


def grid_of(teacher: PretrainedConfig, config: ClipMapConfig) -> Grid:
    """
    Makes the grid of shapes to search: all multiples of the teacher's head width and all depths, up to the teacher's.
    Of a ResNet, it has all widths that fit, and a single depth: the blocks that are given, or the teacher's. Sizes
    that `config` gives are kept; a number of heads that is given without a width is that of the teacher's width.

    Args:
        teacher: The teacher's config.
        config: The config of the student.

    Raises:
        ValueError: If a given size does not fit the teacher.
    """
    grid, config = {}, with_kinds(teacher, config)
    for name in ("vision", "text"):
        tower, given = getattr(teacher, f"{name}_config"), getattr(config, name)
        size, step = given.resolve(tower, name, config.head_rule), head_width(tower)
        if isinstance(given, ResNetTowerConfig):
            widths = fitting_widths(tower) if given.width is None else [size.width]
            grid[name] = TowerGrid(tuple(widths), (sum(size.layers),))
            continue
        grid[name] = TowerGrid(
            tuple(range(step, tower.hidden_size + 1, step))
            if given.hidden_size is given.num_attention_heads is None
            else (size.hidden_size,),
            tuple(range(1, tower.num_hidden_layers + 1))
            if given.num_hidden_layers is None
            else (size.num_hidden_layers,),
        )
    return grid


def with_kinds(teacher: PretrainedConfig, config: ClipMapConfig) -> ClipMapConfig:
    """Returns a config whose vision tower is given in the words of the teacher's, a transformer or a ResNet."""
    return dataclasses.replace(config, vision=size_of_kind(config.vision, teacher.vision_config, "vision"))


def counted_costs(teacher: PretrainedConfig, config: ClipMapConfig, grid: Grid, measure: str) -> Table:
    """
    Computes the costs of each tower's shapes. The sum of both towers is exactly the cost of the model.

    Only models of one and two layers are built, on the meta device. Every further layer costs as much as the second.
    A ResNet has all its blocks in both.

    Args:
        teacher: The teacher's config.
        config: The config of the student, except for its widths and depths.
        grid: The shapes.
        measure: A key of `COUNTED`.
    """

    def cost(**sizes: int) -> int:
        return COUNTED[measure](student_config(teacher, with_shape(config, smallest._replace(**sizes))))

    smallest = Shape(grid["vision"].widths[0], 1, grid["text"].widths[0], 1)
    tables = {}
    for name, tower in grid.items():
        layers = (1, min(2, getattr(teacher, f"{name}_config").num_hidden_layers))
        one_layer, two_layers = (
            [cost(**{f"{name}_width": width, f"{name}_depth": depth}) for width in tower.widths] for depth in layers
        )
        tables[name] = extend_to_depths(one_layer, two_layers, tower.depths)
    tables["text"] -= cost()  # each table includes the other tower at its smallest
    return tables


def extend_to_depths(one: Sequence[float], two: Sequence[float], depths: Sequence[int]) -> torch.Tensor:
    """
    Extrapolates costs linearly in depth.

    Args:
        one: Costs at a depth of one layer, `(widths,)`.
        two: Costs at a depth of two layers, `(widths,)`.
        depths: The depths.

    Returns:
        The costs, `(widths, depths)`.
    """
    first, second, depths = (torch.tensor(values, dtype=torch.float64) for values in (one, two, depths))
    return first[:, None] + (second - first)[:, None] * (depths - 1)


def with_shape(config: ClipMapConfig, shape: Shape) -> ClipMapConfig:
    """Returns a config with the widths and depths of a shape, and without a budget; the blocks of a ResNet stay."""
    if isinstance(config.vision, ResNetTowerConfig):
        vision = dataclasses.replace(config.vision, width=shape.vision_width)
    else:
        vision = dataclasses.replace(
            config.vision, hidden_size=shape.vision_width, num_hidden_layers=shape.vision_depth
        )
    return dataclasses.replace(
        config,
        vision=vision,
        text=dataclasses.replace(config.text, hidden_size=shape.text_width, num_hidden_layers=shape.text_depth),
        budget=None,
    )
