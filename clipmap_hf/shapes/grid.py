"""The shapes that a search looks at, and what each of them costs: a table for each tower, whose entries add up."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from clipmap_hf.config import ClipMapConfig, student_config
from clipmap_hf.costs.cost import model_cost, parameter_count


__all__ = ["COUNTED", "Grid", "Shape", "Table", "TowerGrid", "counted_costs", "grid_of", "of_depths", "shaped"]

# The measures of a budget that a config tells.
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


Grid = dict[str, TowerGrid]  # of `vision` and of `text`
Table = dict[str, torch.Tensor]  # of each tower, `(widths, depths)` of its grid


def grid_of(teacher: PretrainedConfig, config: ClipMapConfig) -> Grid:
    """
    The shapes to search: every multiple of the head width and every depth up to the teacher's, but the sizes that
    `config` gives as they are.

    Raises:
        ValueError: If a given size does not fit the teacher.
    """
    grid = {}
    for name in ("vision", "text"):
        tower, given = getattr(teacher, f"{name}_config"), getattr(config, name)
        head_width = tower.hidden_size // tower.num_attention_heads
        if given.hidden_size is None and given.num_attention_heads is not None:
            given = dataclasses.replace(given, hidden_size=given.num_attention_heads * head_width)
        size = given.resolve(tower, name)
        grid[name] = TowerGrid(
            tuple(range(head_width, tower.hidden_size + 1, head_width))
            if given.hidden_size is None
            else (size.hidden_size,),
            tuple(range(1, tower.num_hidden_layers + 1))
            if given.num_hidden_layers is None
            else (size.num_hidden_layers,),
        )
    return grid


def counted_costs(teacher: PretrainedConfig, config: ClipMapConfig, grid: Grid, measure: str) -> Table:
    """
    What each tower costs by a measure of `COUNTED`; the sum over both is exactly that of `model_cost`.

    Only models of one and two layers are built, on the meta device: every further layer costs what the second does.

    Args:
        teacher: The teacher's config.
        config: All but the widths and depths.
        grid: The shapes.
        measure: A key of `COUNTED`.
    """

    def cost(**sizes: int) -> int:
        return COUNTED[measure](student_config(teacher, shaped(config, smallest._replace(**sizes))))

    smallest = Shape(grid["vision"].widths[0], 1, grid["text"].widths[0], 1)
    tables = {}
    for name, tower in grid.items():
        layers = (1, min(2, getattr(teacher, f"{name}_config").num_hidden_layers))
        one, two = (
            [cost(**{f"{name}_width": width, f"{name}_depth": depth}) for width in tower.widths] for depth in layers
        )
        tables[name] = of_depths(one, two, tower.depths)
    tables["text"] -= cost()  # the other tower, at its smallest, is in both
    return tables


def of_depths(one: Sequence[float], two: Sequence[float], depths: Sequence[int]) -> torch.Tensor:
    """Costs `(widths, depths)`, linear in depth, from those of one layer and of two, `(widths,)`."""
    one, two, depths = (torch.tensor(values, dtype=torch.float64) for values in (one, two, depths))
    return one[:, None] + (two - one)[:, None] * (depths - 1)


def shaped(config: ClipMapConfig, shape: Shape) -> ClipMapConfig:
    """A config with the widths and depths of a shape instead of a budget."""
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(
            config.vision, hidden_size=shape.vision_width, num_hidden_layers=shape.vision_depth
        ),
        text=dataclasses.replace(config.text, hidden_size=shape.text_width, num_hidden_layers=shape.text_depth),
        budget=None,
    )
