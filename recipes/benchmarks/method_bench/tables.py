"""What the bench found: a table for each size, the paper's claim about mapping, and pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from initializer_study.report import draw_band, markdown, pairs_to_reach, spread

from clipmap_hf.atomic import write_atomically


WAYS, KS = ("image_to_text", "text_to_image"), (1, 5, 10)
Cells = Sequence[dict]  # results of one method and size, of several seeds


def write_report(folder: Path, results: Mapping[tuple[str, str], Cells], reference: str, paper: str) -> str:
    """
    Writes `results.json`, `results.md`, `size.png` and a picture of each size's way there.

    Args:
        folder: Of the bench.
        results: What the cells gave, by size and method.
        reference: The method whose final recall others are to reach.
        paper: The method that the paper says is better than the reference.

    Returns:
        The tables as Markdown.
    """
    flat = [one for cells in results.values() for one in cells]
    write_atomically(folder / "results.json", (json.dumps(flat, indent=2) + "\n").encode())
    sections = []
    for size in dict.fromkeys(size for size, _ in results):
        methods = {name: cells for (one, name), cells in results.items() if one == size}
        rows = [method_row(name, cells, methods.get(reference, [])) for name, cells in methods.items()]
        sections += [f"## {size}", markdown(rows)]
        draw(
            folder / f"pairs-{size.split()[0]}.png",
            f"{size}: recall against training pairs",
            "training pairs seen",
            {name: points_on_the_way(cells) for name, cells in methods.items()},
        )
    claims = [
        claim_row(size, results[size, paper], results[size, reference])
        for size in dict.fromkeys(size for size, _ in results)
        if results.get((size, paper)) and results.get((size, reference))
    ]
    if claims:
        sections += [f"## Does {paper} beat {reference}?", markdown(claims)]
    names = dict.fromkeys(name for _, name in results)
    at_the_end = {
        name: [
            (cells[0]["parameters"], [mean_recall(one["recall"], 5) for one in cells])
            for (_, one), cells in results.items()
            if one == name and cells
        ]
        for name in names
    }
    draw(folder / "size.png", "Recall against size", "parameters", at_the_end, log=True)
    report = "\n\n".join(sections) + "\n"
    write_atomically(folder / "results.md", report.encode())
    return report


def method_row(name: str, cells: Cells, reference: Cells) -> dict[str, str]:
    """Recall both ways, costs, and the pairs after which the reference's final recall@5 is reached, of equal seeds."""
    row = {"method": name, "loss": losses(cells[0]["cell"]["method"]["losses"])}
    for k in KS:
        ways = [spread([100 * one["recall"][f"{way}_recall@{k}"] for one in cells]) for way in WAYS]
        row[f"R@{k}"] = " / ".join(ways)
    ends = {one["cell"]["seed"]: mean_recall(one["recall"], 5) for one in reference}
    needed = [
        pairs_to_reach(
            [{"pairs": point["pairs"], "recall": mean_recall(point, 5)} for point in one["curve"]],
            "recall",
            ends[one["cell"]["seed"]],
        )
        for one in cells
        if one["cell"]["seed"] in ends
    ]
    return row | {
        "parameters (M)": f"{cells[0]['parameters'] / 1e6:.2f}",
        "MACs (M)": f"{cells[0]['macs'] / 1e6:.2f}",
        "seconds": f"{median(one['seconds'] for one in cells):.0f}",  # others may share the machine at times
        "pairs to manual's R@5": spread(needed, 0),
        "rate": f"{cells[0]['cell']['rate']:g}",
        "seeds": str(len(cells)),
    }


def losses(weights: Mapping[str, float]) -> str:
    """What a student is distilled by, in a few words."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def claim_row(size: str, ours: Cells, theirs: Cells) -> dict[str, str]:
    """The difference in recall, seed by seed."""
    of_seed = {one["cell"]["seed"]: one["recall"] for one in theirs}
    both = [(one["recall"], of_seed[one["cell"]["seed"]]) for one in ours if one["cell"]["seed"] in of_seed]
    row = {"size": size}
    for k in KS:
        gains = [100 * (mean_recall(mine, k) - mean_recall(other, k)) for mine, other in both]
        row[f"gain in R@{k}"] = spread(gains, 2)
        row[f"seeds ahead, R@{k}"] = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    return row


def mean_recall(point: Mapping[str, float], k: int) -> float:
    """Recall@k, mean of both ways."""
    return sum(point[f"{way}_recall@{k}"] for way in WAYS) / len(WAYS)


def points_on_the_way(cells: Cells) -> list[tuple[float, list[float]]]:
    """Pairs seen, and recall@5 of all seeds."""
    recalls = [[mean_recall(point, 5) for point in one["curve"]] for one in cells]
    pairs = [point["pairs"] for point in cells[0]["curve"]] if cells else []
    return list(zip(pairs, map(list, zip(*recalls, strict=True)), strict=True))


def draw(path: Path, title: str, label: str, lines: Mapping[str, Sequence[tuple]], *, log: bool = False) -> None:
    """Recall@5 of each method, a line through its points `(x, recalls of all seeds)` in a band of one deviation."""
    from matplotlib import colormaps  # not a dependency, and only pictures need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes, colors = figure.subplots(), colormaps["tab20"].colors
    for color, (name, points) in zip(colors, lines.items(), strict=False):
        ordered = sorted(points)
        recalls = [100 * np.array(seeds) for _, seeds in ordered]
        draw_band(axes, name, [place for place, _ in ordered], recalls, color=color)
    axes.set(title=title, xlabel=label, ylabel="recall@5 in percent, mean of both directions")
    axes.set_xscale("log" if log else "linear")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)
