"""What the bench found: a table for each size, the paper's claim about mapping, and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from study import report
from study.curves import pairs_to_reach
from study.pictures import Points, draw_bands, new_figure
from study.recall import KS, mean_recall, recall_columns
from study.tables import markdown, spread


Cells = Sequence[dict]  # results of a method and size, of several seeds
Results = Mapping[tuple[str, str], Cells]  # by size and method


def write_report(folder: Path, results: Results, reference: str, paper: str) -> str:
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
    sections, sizes = [], list(dict.fromkeys(size for size, _ in results))
    for size in sizes:
        methods = {name: cells for (of_cells, name), cells in results.items() if of_cells == size}
        rows = [method_row(name, cells, methods.get(reference, [])) for name, cells in methods.items()]
        sections += [f"## {size}", markdown(rows)]
        draw(
            folder / f"pairs-{size.split()[0]}.png",
            {name: points_on_the_way(cells) for name, cells in methods.items()},
            title=f"{size}: recall against training pairs",
            xlabel="training pairs seen",
        )
    claims = [
        claim_row(size, results[size, paper], results[size, reference])
        for size in sizes
        if results.get((size, paper)) and results.get((size, reference))
    ]
    if claims:
        sections += [f"## Does {paper} beat {reference}?", markdown(claims)]
    draw(
        folder / "size.png", points_at_the_end(results), title="Recall against size", xlabel="parameters", xscale="log"
    )
    return report.write_report(folder, [cell for cells in results.values() for cell in cells], sections)


def method_row(name: str, cells: Cells, reference: Cells) -> dict[str, str]:
    """Writes recall both ways, costs, and after how many pairs the reference's final recall@5 of a seed is reached."""
    ends = {cell["cell"]["seed"]: mean_recall(cell["recall"], 5) for cell in reference}
    needed = [
        pairs_to_reach(
            [{"pairs": point["pairs"], "recall": mean_recall(point, 5)} for point in cell["curve"]],
            "recall",
            ends[cell["cell"]["seed"]],
        )
        for cell in cells
        if cell["cell"]["seed"] in ends
    ]
    return {
        "method": name,
        "loss": losses(cells[0]["cell"]["method"]["losses"]),
        **recall_columns([cell["recall"] for cell in cells]),
        "parameters (M)": f"{cells[0]['parameters'] / 1e6:.2f}",
        "MACs (M)": f"{cells[0]['macs'] / 1e6:.2f}",
        "seconds": f"{median(cell['seconds'] for cell in cells):.0f}",  # others may share the machine at times
        "pairs to manual's R@5": spread(needed, 0),
        "rate": f"{cells[0]['cell']['rate']:g}",
        "seeds": str(len(cells)),
    }


def losses(weights: Mapping[str, float]) -> str:
    """Tells what a student is distilled by, in a few words."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def claim_row(size: str, ours: Cells, theirs: Cells) -> dict[str, str]:
    """Writes the difference in recall, seed by seed."""
    of_seed = {cell["cell"]["seed"]: cell["recall"] for cell in theirs}
    both = [(cell["recall"], of_seed[cell["cell"]["seed"]]) for cell in ours if cell["cell"]["seed"] in of_seed]
    row = {"size": size}
    for k in KS:
        gains = [100 * (mean_recall(mine, k) - mean_recall(other, k)) for mine, other in both]
        row[f"gain in R@{k}"] = spread(gains, 2)
        row[f"seeds ahead, R@{k}"] = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    return row


def points_on_the_way(cells: Cells) -> Points:
    """Picks the pairs seen, and recall@5 of all seeds in percent."""
    curves = zip(*(cell["curve"] for cell in cells), strict=True)
    return [(of_seeds[0]["pairs"], [100 * mean_recall(point, 5) for point in of_seeds]) for of_seeds in curves]


def points_at_the_end(results: Results) -> dict[str, Points]:
    """Picks, of each method, the parameters of each size, and the final recall@5 of all seeds in percent."""
    points = {name: [] for _, name in results}
    for (_, name), cells in results.items():
        points[name].append((cells[0]["parameters"], [100 * mean_recall(cell["recall"], 5) for cell in cells]))
    return points


def draw(path: Path, lines: Mapping[str, Points], **settings: str) -> None:
    """Draws recall@5 of each method; `settings` are those of the axes."""
    figure = new_figure(12, 6)
    axes = figure.subplots()
    draw_bands(axes, lines, palette="tab20", ylabel="recall@5 in percent, mean of both directions", **settings)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)
