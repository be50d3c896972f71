"""The best shape of a student within a budget, with what it was chosen from and by what."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from clipmap_hf.config import Budget, ClipMapConfig, cut_towers, student_config
from clipmap_hf.files.tables import markdown_table, scaled_column
from clipmap_hf.shapes.grid import Grid, Shape, Table, counted_costs, grid_of, shaped
from clipmap_hf.shapes.latency import latency_costs, measured_latency
from clipmap_hf.shapes.rules import Rule, energy_rule, literature_rule


__all__ = ["Candidate", "Choice", "choose_shape"]

_UNITS = {"params": ("MK", ""), "macs": ("GMK", ""), "bytes": ("MK", "B")}
_ROUNDS = 3  # of a search by latency


@dataclass(frozen=True)
class Candidate:
    """A shape, what it costs in the budget's measure, and its score."""

    shape: Shape
    cost: float
    score: float


@dataclass(frozen=True)
class Choice:
    """
    What a search found; prints as an explanation and a table, the chosen shape first.

    Args:
        config: What to make: that which was searched for, with the chosen widths and depths.
        budget: What it may cost.
        candidates: The best, best first.
        fitting: How many shapes there were to choose from.
        rule: What they were compared by.
        measured_ms: What the chosen shape takes, if the budget is a latency.
    """

    config: ClipMapConfig
    budget: Budget
    candidates: list[Candidate]
    fitting: int
    rule: Rule
    measured_ms: float | None = None

    def __str__(self) -> str:
        shapes = [one.shape for one in self.candidates]
        units, ending = _UNITS.get(self.budget.measure, ("", ""))
        if units:
            unit, *costs = scaled_column([one.cost for one in self.candidates], units)
            header = f"{self.budget.measure} ({unit}{ending})"
        else:
            header, costs = "latency (ms)", [f"{one.cost:.2f}" for one in self.candidates]
        table = markdown_table(
            [
                ["vision, width × depth", *(f"{one.vision_width} × {one.vision_depth}" for one in shapes)],
                ["text, width × depth", *(f"{one.text_width} × {one.text_depth}" for one in shapes)],
                [header, *costs],
                ["of the budget", *(f"{one.cost / self.budget.limit:.1%}" for one in self.candidates)],
                [self.rule.column, *(self.rule.shown(one.score) for one in self.candidates)],
            ]
        )
        lines = [
            f"Budget {self.budget}: {self.fitting:,} shapes fit, and would not with a head or a layer more.",
            self.rule.why,
            "",
            table,
        ]
        if self.measured_ms is not None:
            over = "" if self.measured_ms <= self.budget.limit else ", more than the budget"
            lines += ["", f"Measured, the chosen shape takes {self.measured_ms:.2f} ms{over}."]
        return "\n".join(lines)


def choose_shape(
    teacher: PretrainedConfig,
    config: ClipMapConfig,
    kept: Mapping[str, torch.Tensor] | None = None,
    *,
    shown: int = 5,
) -> Choice:
    """
    Searches the widths (multiples of the head width) and depths that `config` leaves open for the best within its
    budget. Compared are the shapes that fit and would no longer if any width or depth were one step larger: by what
    they keep, if `kept` says it (`energy_rule`), else by how near they are to the shapes of the literature
    (`literature_rule`). Of equals, the one that costs most is chosen.

    Parameters, MACs and bytes are exact. Latencies are measured at one and two layers and extended; what the chosen
    shape takes is measured, and if it is more than the budget, all are scaled by it and chosen from again, three
    times at most.

    Args:
        teacher: The teacher's config.
        config: With a budget. Sizes that it gives stay.
        kept: As `kept_energy` gives it.
        shown: How many candidates to keep for the table.

    Raises:
        ValueError: If there is no budget, no shape is small enough (the message says what the smallest costs), the
            teacher itself is, or a size does not fit the teacher.
    """
    if (budget := config.budget) is None:
        raise ValueError("The config has no budget to choose a shape for; give one, such as budget={'params': '30M'}.")
    grid = grid_of(teacher, config)
    if budget.measure != "latency_ms":
        costs = counted_costs(teacher, config, grid, budget.measure)
        return _choice(teacher, config, grid, costs, kept, shown)
    costs = latency_costs(teacher, config, grid, budget)
    for _ in range(_ROUNDS):
        choice = _choice(teacher, config, grid, costs, kept, shown)
        took = sum(measured_latency(student_config(teacher, choice.config), budget).values())
        if took <= budget.limit:
            break
        costs = {name: table * took / choice.candidates[0].cost for name, table in costs.items()}
    return Choice(choice.config, budget, choice.candidates, choice.fitting, choice.rule, took)


def _choice(
    teacher: PretrainedConfig,
    config: ClipMapConfig,
    grid: Grid,
    costs: Table,
    kept: Mapping[str, torch.Tensor] | None,
    shown: int,
) -> Choice:
    limit = config.budget.limit
    _check_smallest(config.budget, grid, costs)
    if kept is None:
        rule = literature_rule(teacher, grid, costs, limit)
    else:
        towers = {name: getattr(teacher, f"{name}_config") for name in grid}
        head_widths = {name: tower.hidden_size // tower.num_attention_heads for name, tower in towers.items()}
        rule = energy_rule(grid, kept, head_widths)
    total, score = (one["vision"][:, :, None, None] + one["text"] for one in (costs, rule.scores))
    sizes = [values for tower in grid.values() for values in (tower.widths, tower.depths)]
    found = []
    for place in map(tuple, _maximal(costs, limit).nonzero().tolist()):
        shape = Shape(*(values[index] for values, index in zip(sizes, place, strict=True)))
        found.append(Candidate(shape, float(total[place]), float(score[place])))
    found.sort(key=lambda one: (-round(one.score, 9), -one.cost))
    if not cut_towers(teacher, student_config(teacher, shaped(config, found[0].shape))):
        raise ValueError(
            f"The budget {config.budget} leaves nothing to compress: the teacher has {config.budget.measure}="
            f"{found[0].cost:,.10g}. Allow less."
        )
    return Choice(shaped(config, found[0].shape), config.budget, found[:shown], len(found), rule)


def _maximal(costs: Table, limit: float) -> torch.Tensor:
    """Which pairs of shapes `(vision widths, depths, text widths, depths)` fit and can grow in nothing."""
    left = limit - (costs["vision"][:, :, None, None] + costs["text"])
    step = {}
    for name, table in costs.items():
        wider, deeper = (torch.full_like(table, torch.inf) for _ in range(2))
        wider[:-1], deeper[:, :-1] = table[1:] - table[:-1], table[:, 1:] - table[:, :-1]
        step[name] = torch.minimum(wider, deeper)
    return (left >= 0) & (left < step["vision"][:, :, None, None]) & (left < step["text"])


def _check_smallest(budget: Budget, grid: Grid, costs: Table) -> None:
    vision, text = grid["vision"], grid["text"]
    smallest = float(costs["vision"].min() + costs["text"].min())
    if smallest > budget.limit:
        raise ValueError(
            f"The budget {budget} cannot be met: the smallest shape to choose from, vision {vision.widths[0]} × "
            f"{vision.depths[0]} and text {text.widths[0]} × {text.depths[0]} (width × depth), has "
            f"{budget.measure}={smallest:,.10g}. Allow more, or leave sizes open that are given."
        )
