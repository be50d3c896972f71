"""Measures what each tower costs in time, on random models of one and two layers at every width."""

import copy

import torch
from transformers import AutoModel, PretrainedConfig

from clipmap_hf.config import Budget, ClipMapConfig, student_config
from clipmap_hf.costs.latency import milliseconds, random_inputs
from clipmap_hf.distributed import broadcast, join_processes, process_index
from clipmap_hf.models.features import Towers
from clipmap_hf.shapes.grid import Grid, Shape, Table, extend_to_depths, with_shape


__all__ = ["latency_costs", "measured_latency"]

_SECONDS = 0.3  # the shortest duration of a tower's measurement


def latency_costs(teacher: PretrainedConfig, config: ClipMapConfig, grid: Grid, budget: Budget) -> Table:
    """
    Measures the milliseconds of a batch in each tower's shapes. Times are extrapolated linearly in depth. They are
    raised where a shape would take less time than a smaller shape.

    Args:
        teacher: The teacher's config.
        config: The config of the student, except for its widths and depths.
        grid: The shapes.
        budget: A budget of latency, which gives the batch size and the device of the measurement.
    """
    measured = {(name, layers): [] for name in grid for layers in (1, 2)}
    widths = {name: tower.widths for name, tower in grid.items()}
    for index in range(max(map(len, widths.values()))):
        vision, text = (widths[name][min(index, len(widths[name]) - 1)] for name in ("vision", "text"))
        for layers in (1, 2):
            depths = [min(layers, getattr(teacher, f"{name}_config").num_hidden_layers) for name in widths]
            small = student_config(teacher, with_shape(config, Shape(vision, depths[0], text, depths[1])))
            names = [name for name in widths if index < len(widths[name])]
            for name, time in measured_latency(small, budget, names).items():
                measured[name, layers].append(time)
    for name in grid:
        if not hasattr(getattr(teacher, f"{name}_config"), "intermediate_size"):  # a ResNet, whose depth is no matter
            measured[name, 2] = measured[name, 1]
    tables = {
        name: extend_to_depths(measured[name, 1], measured[name, 2], tower.depths).clamp(min=0)
        for name, tower in grid.items()
    }
    return {name: table.cummax(dim=0).values.cummax(dim=1).values for name, table in tables.items()}


def measured_latency(
    config: PretrainedConfig, budget: Budget, towers: tuple[str, ...] | list[str] = ("vision", "text")
) -> dict[str, float]:
    """
    Measures the median milliseconds of a batch in each tower of a random model, with texts of full length. If there
    are several processes, the first process measures.

    Args:
        config: The model's config.
        budget: A budget of latency, which gives the batch size and the device.
        towers: `vision`, `text` or both.

    Returns:
        The milliseconds by tower.
    """
    times = torch.zeros(len(towers), dtype=torch.float64)
    if process_index() == 0:
        model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32).eval().to(budget.device)
        passes = Towers.of_model(model).passes(random_inputs(config, budget.batch_size))
        times[:] = torch.tensor([milliseconds(passes[name], _SECONDS) for name in towers], dtype=torch.float64)
    broadcast([times], join_processes().device)
    return dict(zip(towers, times.tolist(), strict=True))
