"""Draws charts as SVG and HTML that take their colors from the page around them."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple


__all__ = ["CHART_STYLE", "Series", "bars", "learning_curves"]

CHART_STYLE = """
svg { width: 100%; height: auto; max-width: 46rem; font: 13px system-ui, sans-serif; display: block }
svg text { fill: var(--ink) } svg .axis { stroke: var(--line) }
svg .level { stroke: var(--ink); stroke-dasharray: 5 4 }
svg polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.bars { display: grid; grid-template-columns: max-content 1fr 1fr; gap: .35rem 1rem; max-width: 56rem }
.bars b { font-weight: 600 }
.bar { display: flex; align-items: center; gap: .4rem; font-variant-numeric: tabular-nums }
.bar i { background: var(--accent); height: .9rem; border-radius: .2rem; min-width: 1px }
@media (max-width: 40rem) {
  svg { font-size: 19px }
  .bars { grid-template-columns: 1fr 1fr } .bars .name { grid-column: 1 / -1; margin-top: .4rem }
  .bars b.name { display: none }
}
"""
_COLORS = ("#2f7ed8", "#d9822b", "#0f9d76", "#b65fcf", "#8a8f98", "#c2454a")  # legible on white and on black
_WIDTH, _HEIGHT = 640, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 62


class Series(NamedTuple):
    """Points of a student: pairs seen and recall, between 0 and 1."""

    name: str
    points: Sequence[tuple[int, float]]


def learning_curves(series: Sequence[Series], levels: Mapping[str, float]) -> str:
    """
    Draws recall against the number of pairs seen.

    Args:
        series: A line for each student.
        levels: Recall of models that are not trained here, as dashed lines.

    Returns:
        An SVG element, with a legend below it.
    """
    points = [point for one in series for point in one.points]
    most = max((pairs for pairs, _ in points), default=1)
    top = 10 * max(1, -(-int(1000 * max([*levels.values(), *(recall for _, recall in points)])) // 100))
    axes = _Axes(most, top)
    lines = [axes.grid()]
    for name, level in levels.items():
        y = axes.y(100 * level)
        lines.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT + 6}" y="{y + 16:.1f}">{html.escape(name)} {100 * level:.0f} %</text>')
    for one, color in zip(series, _COLORS * len(series), strict=False):
        places = [(axes.x(pairs), axes.y(100 * recall)) for pairs, recall in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" style="stroke:{color}"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{color}"/>' for x, y in places]
    legend = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(one.name)}</span>'
        for one, color in zip(series, _COLORS * len(series), strict=False)
    )
    label = "Recall at 10 against the number of training pairs"
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(lines)}</svg>'
    return f'{drawing}<p class="legend">{legend}</p>'


def bars(names: Sequence[str], measures: Mapping[str, Sequence[float]]) -> str:
    """
    Draws numbers as bars, each measure on a scale of its own that begins at 0.

    Args:
        names: Names of the rows.
        measures: The numbers of the rows, by the title of their column.
    """
    cells = ['<b class="name"></b>', *(f"<b>{html.escape(title)}</b>" for title in measures)]
    for row, name in enumerate(names):
        cells.append(f'<span class="name">{html.escape(name)}</span>')
        for values in measures.values():
            share = values[row] / max(*values, 1e-9)
            width = f"calc((100% - 3.4rem) * {share:.4f})"
            cells.append(f'<span class="bar"><i style="width:{width}"></i>{values[row]:.2f}</span>')
    return f'<div class="bars">{"".join(cells)}</div>'


class _Axes(NamedTuple):
    """Where values lie in the drawing."""

    most: int  # pairs
    top: int  # percent

    def x(self, pairs: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * pairs / self.most

    def y(self, percent: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - percent / self.top)

    def grid(self) -> str:
        """Lines and labels at round numbers."""
        step = _round_step(self.most / 5)
        drawn = []
        for percent in range(0, self.top + 1, 10):
            y = self.y(percent)
            drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
        for pairs in range(0, self.most + 1, step):
            place = f'x="{self.x(pairs):.1f}" y="{_HEIGHT - _BOTTOM + 20}"'
            drawn.append(f'<text {place} text-anchor="middle">{pairs:,}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        drawn.append(f'<text x="{middle}" y="{_HEIGHT - 18}" text-anchor="middle">training pairs seen</text>')
        return "".join(drawn)


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that is not below a number."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= least:
                return digit * scale
        scale *= 10
