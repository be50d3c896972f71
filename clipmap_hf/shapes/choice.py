"""Chooses the best shape of a student within a budget, and explains the choice."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from clipmap_hf.config import Budget, ClipMapConfig, cut_towers, student_config
from clipmap_hf.config.heads import head_width
from clipmap_hf.files.tables import markdown_table, scaled_column
from clipmap_hf.shapes.grid import Grid, Shape, Table, counted_costs, grid_of, with_kinds, with_shape
from clipmap_hf.shapes.latency import latency_costs, measured_latency
from clipmap_hf.shapes.rules import Rule, energy_rule, literature_rule


__all__ = ["Candidate", "Choice", "choose_shape"]

_UNITS = {"params": ("MK", ""), "macs": ("GMK", ""), "bytes": ("MK", "B")}
_ROUNDS = 3  # the most choices that a search by latency makes


@dataclass(frozen=True)
class Candidate:
    """A shape, its cost in the measure of the budget, and its score."""

    shape: Shape
    cost: float
    score: float


@dataclass(frozen=True)
class Choice:
    """
    The result of a search. It prints as an explanation and a table of candidates, with the chosen shape first.

    Args:
        config: The config of the search, with the chosen widths and depths.
        budget: The budget.
        candidates: The best shapes, best first.
        fitting: Number of shapes that were compared.
        rule: The rule that gave the scores.
        measured_ms: Measured latency of the chosen shape in milliseconds, if the budget is a latency.
    """

    config: ClipMapConfig
    budget: Budget
    candidates: list[Candidate]
    fitting: int
    rule: Rule
    measured_ms: float | None = None

    def __str__(self) -> str:
        shapes = [candidate.shape for candidate in self.candidates]
        units, ending = _UNITS.get(self.budget.measure, ("", ""))
        if units:
            unit, *costs = scaled_column([candidate.cost for candidate in self.candidates], units)
            header = f"{self.budget.measure} ({unit}{ending})"
        else:
            header, costs = "latency (ms)", [f"{candidate.cost:.2f}" for candidate in self.candidates]
        table = markdown_table(
            [
                ["vision, width × depth", *(f"{shape.vision_width} × {shape.vision_depth}" for shape in shapes)],
                ["text, width × depth", *(f"{shape.text_width} × {shape.text_depth}" for shape in shapes)],
                [header, *costs],
                ["of the budget", *(f"{candidate.cost / self.budget.limit:.1%}" for candidate in self.candidates)],
                [self.rule.column, *(self.rule.shown(candidate.score) for candidate in self.candidates)],
            ]
        )
        lines = [
            f"Budget {self.budget}: {self.fitting:,} shapes fit, and would not with a head or a layer more.",
            self.rule.why,
            "",
            table,
        ]
        if self.measured_ms is not None:
            excess = "" if self.measured_ms <= self.budget.limit else ", more than the budget"
            lines += ["", f"Measured, the chosen shape takes {self.measured_ms:.2f} ms{excess}."]
        return "\n".join(lines)


def choose_shape(
    teacher: PretrainedConfig,
    config: ClipMapConfig,
    kept: Mapping[str, torch.Tensor] | None = None,
    *,
    shown: int = 5,
) -> Choice:
    """
    Chooses the widths (multiples of the teacher's head width; of a ResNet, even ones) and depths that `config` leaves
    open.

    Only shapes are compared that fit the budget, and would not fit it if any width or depth were one step larger. With
    `kept`, the best shape keeps most of the teacher's energy (`energy_rule`). Otherwise, it is the shape that is
    nearest to the shapes of the literature (`literature_rule`). Of shapes with equal scores, the most expensive shape
    is chosen.

    Parameters, MACs and bytes are exact. Latencies are measured at depths of one and two layers, and extrapolated.
    Then the latency of the chosen shape is measured. If it exceeds the budget, all latencies are scaled accordingly,
    and the choice is repeated. There are at most three choices.

    Args:
        teacher: The teacher's config.
        config: The config of the student, with a budget. Sizes that it gives are kept.
        kept: The result of `kept_energy`.
        shown: Number of candidates in the table.

    Raises:
        ValueError: If there is no budget, no shape is small enough (the message gives the cost of the smallest shape),
            the teacher itself fits the budget, or a given size does not fit the teacher.
    """
    if (budget := config.budget) is None:
        raise ValueError("The config has no budget to choose a shape for; give budget=, such as {'params': '30M'}.")
    grid, config = grid_of(teacher, config), with_kinds(teacher, config)
    if budget.measure != "latency_ms":
        costs = counted_costs(teacher, config, grid, budget.measure)
        return _choose(teacher, config, grid, costs, kept, shown)
    costs = latency_costs(teacher, config, grid, budget)
    for _ in range(_ROUNDS):
        choice = _choose(teacher, config, grid, costs, kept, shown)
        measured = sum(measured_latency(student_config(teacher, choice.config), budget).values())
        if measured <= budget.limit:
            break
        costs = {name: table * measured / choice.candidates[0].cost for name, table in costs.items()}
    return Choice(choice.config, budget, choice.candidates, choice.fitting, choice.rule, measured)


def _choose(
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
        head_widths = {name: head_width(tower) for name, tower in towers.items()}
        rule = energy_rule(grid, kept, head_widths)
    total, score = (table["vision"][:, :, None, None] + table["text"] for table in (costs, rule.scores))
    sizes = [values for tower in grid.values() for values in (tower.widths, tower.depths)]
    candidates = []
    for place in map(tuple, _find_maximal(costs, limit).nonzero().tolist()):
        shape = Shape(*(values[index] for values, index in zip(sizes, place, strict=True)))
        candidates.append(Candidate(shape, float(total[place]), float(score[place])))
    candidates.sort(key=lambda candidate: (-round(candidate.score, 9), -candidate.cost))
    best = candidates[0]
    if not cut_towers(teacher, student_config(teacher, with_shape(config, best.shape))):
        raise ValueError(
            f"The budget {config.budget} leaves nothing to compress: the teacher has {config.budget.measure}="
            f"{best.cost:,.10g}. Allow less."
        )
    return Choice(with_shape(config, best.shape), config.budget, candidates[:shown], len(candidates), rule)


def _find_maximal(costs: Table, limit: float) -> torch.Tensor:
    """
    Finds the shapes that fit the limit, and would not fit it if any width or depth were one step larger.

    Args:
        costs: The costs of each tower's shapes.
        limit: The most that both towers may cost together.

    Returns:
        Whether each shape is such a shape, `(vision widths, vision depths, text widths, text depths)`.
    """
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
            f"{budget.measure}={smallest:,.10g}. Allow more, or give fewer sizes."
        )
