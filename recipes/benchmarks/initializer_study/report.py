"""What a study found: tables over seeds, curves, and how much sooner than manual inheritance a start learns."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from clipmap_hf.atomic import write_atomically


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
    flat = [{"part": part, "row": row, **one} for (part, _, row), runs in results.items() for one in runs]
    write_atomically(folder / "results.json", (json.dumps(flat, indent=2) + "\n").encode())
    (teacher,) = (one["untrained"]["recall@5"] for runs in of_part(results, "teacher").values() for one in runs)
    sections = []
    for part in dict.fromkeys(part for part, _, _ in results):
        found = of_part(results, part)
        sections += [f"## {part}", markdown([recall_row(*key, runs, teacher) for key, runs in found.items()])]
        if part == "curves":
            for size in dict.fromkeys(size for size, _ in found):
                curves = {row: runs for (one, row), runs in found.items() if one == size}
                draw(folder / f"curves-{size.split()[0]}.png", size, curves)
                if REFERENCE in curves:
                    rows = [lead_row(size, row, runs, curves[REFERENCE]) for row, runs in curves.items()]
                    sections += [f"### {size}: compared with {REFERENCE}", markdown(rows)]
    report = "\n\n".join(sections) + "\n"
    write_atomically(folder / "results.md", report.encode())
    return report


def of_part(results: Mapping[tuple[str, str, str], Runs], part: str) -> dict[tuple[str, str], Runs]:
    """The runs of a part by size and row."""
    return {(size, row): runs for (one, size, row), runs in results.items() if one == part}


def recall_row(size: str, name: str, runs: Runs, teacher: float) -> dict[str, str]:
    """Recall in percent after each stage; of the untrained student also as a share of the teacher's recall@5."""
    settings = runs[0]["settings"]
    rates = [f"{settings[stage]['rate']:g}" if settings[stage] else "–" for stage in ("mapping", "distillation")]
    row = {"size": size, "run": name, "rates": ", ".join(rates)}
    for stage, title in STAGES.items():
        for metric, short in METRICS.items():
            row[f"{title} {short}"] = spread([100 * one[stage][metric] for one in runs if stage in one])
    row["untrained / teacher R@5"] = spread([100 * one["untrained"]["recall@5"] / teacher for one in runs])
    return row | {"seeds": str(len(runs))}


def lead_row(size: str, name: str, runs: Runs, reference: Runs) -> dict[str, str]:
    """
    The pairs after which runs reach the recall that the reference of their seed ends with, how often these go into all
    of its pairs, and recall@1 as a multiple of the reference's after as many pairs.
    """
    of_seed = {one["settings"]["seed"]: one["curve"] for one in reference}
    both = [(one["curve"], of_seed[seed]) for one in runs if (seed := one["settings"]["seed"]) in of_seed]
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


def pairs_to_reach(curve: Sequence[Mapping[str, float]], metric: str, target: float) -> float:
    """Pairs seen when a metric first reaches a target, on straight lines between evaluations; infinite if never."""
    if curve[0][metric] >= target:
        return curve[0]["pairs"]
    for before, after in pairwise(curve):
        if after[metric] >= target:
            share = (target - before[metric]) / (after[metric] - before[metric])
            return before["pairs"] + share * (after["pairs"] - before["pairs"])
    return math.inf


def value_at(curve: Sequence[Mapping[str, float]], metric: str, pairs: float) -> float:
    """A metric after some pairs, on straight lines between evaluations."""
    return float(np.interp(pairs, [point["pairs"] for point in curve], [point[metric] for point in curve]))


def quotient(one: float, other: float) -> float:
    """No number if there is none to divide by."""
    return one / other if 0 < other < math.inf else math.nan


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation of all seeds; `–` if one of them has no number."""
    if not values or not all(map(math.isfinite, values)):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table of the columns that hold anything."""
    columns = [column for column in rows[0] if any(row[column] != "–" for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, size: str, curves: Mapping[str, Runs]) -> None:
    """Recall against pairs seen, a line for each row in a band of one standard deviation."""
    from matplotlib.figure import Figure  # not a dependency, and of all parts only this one draws

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        for name, runs in curves.items():
            pairs = [point["pairs"] for point in runs[0]["curve"]]
            recall = 100 * np.array([[point[metric] for point in one["curve"]] for one in runs]).T  # (points, seeds)
            draw_band(axes, name, pairs, recall)
        axes.set(title=f"{size}: {metric}", xlabel="training pairs seen", ylabel="percent, mean of both directions")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_band(axes, name: str, places: Sequence[float], values: Iterable[Sequence[float]], **options) -> None:
    """The mean over seeds at each place as a line, in a band of one standard deviation."""
    mean, deviation = np.array([(np.mean(seeds), np.std(seeds, ddof=min(1, len(seeds) - 1))) for seeds in values]).T
    (line,) = axes.plot(places, mean, marker=".", label=name, **options)
    axes.fill_between(places, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, lw=0)
