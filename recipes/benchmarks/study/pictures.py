"""Pictures over seeds: bands of a standard deviation around means. matplotlib, which draws them, is no dependency."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Points = Sequence[tuple[float, Sequence[float]]]  # a place, and the values of all seeds there


def new_figure(width: float, height: float):
    """Makes an empty figure, of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_bands(axes, bands: Mapping[str, Points], *, palette: str | None = None, **settings: Any) -> None:
    """
    Draws the mean over seeds at each place as a line, in a band of a standard deviation.

    Args:
        axes: Of a figure.
        bands: The points of each line, by name.
        palette: A list of colors that matplotlib knows; no more lines are drawn than it has colors.
        settings: Title, labels and scales of the axes.
    """
    for options, (name, points) in zip(_line_options(palette, len(bands)), bands.items(), strict=False):
        places, values = zip(*sorted(points), strict=True)
        mean = np.array([np.mean(seeds) for seeds in values])
        deviation = np.array([np.std(seeds, ddof=min(1, len(seeds) - 1)) for seeds in values])
        (line,) = axes.plot(places, mean, marker=".", label=name, **options)
        axes.fill_between(places, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(**settings)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _line_options(palette: str | None, lines: int) -> list[dict[str, Any]]:
    if palette is None:
        return [{}] * lines
    from matplotlib import colormaps

    return [{"color": color} for color in colormaps[palette].colors]
