"""What a study found: tables over seeds, curves, and how much sooner than manual inheritance a start learns."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from study import report
from study.curves import pairs_to_reach, value_at
from study.pictures import draw_bands, new_figure
from study.tables import markdown, spread


REFERENCE = "manual inheritance"  # the row of the part `curves` that the others are compared with
STAGES = {"untrained": "untrained", "mapping": "mapped", "distillation": "distilled"}
METRICS = {"recall@1": "R@1", "recall@5": "R@5"}
SHARES = (0.25, 0.5, 1.0)  # of all pairs, after which recall is compared

Runs = Sequence[dict]  # results of the same settings, but for the seed


def write_report(folder: Path, results: Mapping[tuple[str, str, str], Runs]) -> str:
    """
    Writes `results.json`, `results.md` and a PNG of each size's curves.

    Args:
        folder: Of the study.
        results: What the runs gave, by part, size and row.

    Returns:
        The tables as Markdown.
    """
    (teacher,) = (run["untrained"]["recall@5"] for runs in of_part(results, "teacher").values() for run in runs)
    sections = []
    for part in dict.fromkeys(part for part, _, _ in results):
        found = of_part(results, part)
        sections += [f"## {part}", markdown([recall_row(*key, runs, teacher) for key, runs in found.items()])]
        if part == "curves":
            for size in dict.fromkeys(size for size, _ in found):
                curves = {row: runs for (of_row, row), runs in found.items() if of_row == size}
                draw(folder / f"curves-{size.split()[0]}.png", size, curves)
                if REFERENCE in curves:
                    rows = [lead_row(size, row, runs, curves[REFERENCE]) for row, runs in curves.items()]
                    sections += [f"### {size}: compared with {REFERENCE}", markdown(rows)]
    flat = [{"part": part, "row": row, **run} for (part, _, row), runs in results.items() for run in runs]
    return report.write_report(folder, flat, sections)


def of_part(results: Mapping[tuple[str, str, str], Runs], part: str) -> dict[tuple[str, str], Runs]:
    """Picks the runs of a part, by size and row."""
    return {(size, row): runs for (of_runs, size, row), runs in results.items() if of_runs == part}


def recall_row(size: str, name: str, runs: Runs, teacher: float) -> dict[str, str]:
    """Writes recall in percent after each stage, and of the untrained student as a share of the teacher's recall@5."""
    settings = runs[0]["settings"]
    rates = [f"{settings[stage]['rate']:g}" if settings[stage] else "–" for stage in ("mapping", "distillation")]
    row = {"size": size, "run": name, "rates": ", ".join(rates)}
    for stage, title in STAGES.items():
        for metric, short in METRICS.items():
            row[f"{title} {short}"] = spread([100 * run[stage][metric] for run in runs if stage in run])
    row["untrained / teacher R@5"] = spread([100 * run["untrained"]["recall@5"] / teacher for run in runs])
    return row | {"seeds": str(len(runs))}


def lead_row(size: str, name: str, runs: Runs, reference: Runs) -> dict[str, str]:
    """
    Writes after how many pairs runs reach the recall that the reference of their seed ends with, how often these go
    into all of its pairs, and recall@1 as a multiple of the reference's after as many pairs.
    """
    of_seed = {run["settings"]["seed"]: run["curve"] for run in reference}
    both = [(run["curve"], of_seed[seed]) for run in runs if (seed := run["settings"]["seed"]) in of_seed]
    row = {"run": name}
    for metric, short in METRICS.items():
        pairs = [pairs_to_reach(ours, metric, theirs[-1][metric]) for ours, theirs in both]
        factors = [quotient(theirs[-1]["pairs"], needed) for needed, (_, theirs) in zip(pairs, both, strict=True)]
        row |= {f"pairs to its {short}": spread(pairs, 0), f"factor {short}": spread(factors, 2)}
    for share in SHARES:
        recalls = [
            [value_at(curve, "recall@1", share * theirs[-1]["pairs"]) for curve in (ours, theirs)]
            for ours, theirs in both
        ]
        row[f"R@1 ratio at {share:.0%}"] = spread([quotient(*of_both) for of_both in recalls], 2)
    return row | {"seeds": str(len(both))}


def quotient(dividend: float, divisor: float) -> float:
    """Divides; no number if there is none to divide by."""
    return dividend / divisor if 0 < divisor < math.inf else math.nan


def draw(path: Path, size: str, curves: Mapping[str, Runs]) -> None:
    """Draws recall against pairs seen, a line for each row."""
    figure = new_figure(11, 4.5)
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        draw_bands(
            axes,
            {name: points(runs, metric) for name, runs in curves.items()},
            title=f"{size}: {metric}",
            xlabel="training pairs seen",
            ylabel="percent, mean of both directions",
        )
    axes.legend()
    figure.savefig(path, dpi=150)


def points(runs: Runs, metric: str) -> list[tuple[float, list[float]]]:
    """Picks the pairs seen, and a metric of all seeds in percent."""
    curves = zip(*(run["curve"] for run in runs), strict=True)
    return [(of_seeds[0]["pairs"], [100 * point[metric] for point in of_seeds]) for of_seeds in curves]
