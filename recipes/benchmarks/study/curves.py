"""The curve of a student: what it reached at every evaluation of its training, after how many pairs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np


EVALUATIONS = 10  # on the way of a whole budget
Curve = Sequence[Mapping[str, float]]  # points of `pairs` and metrics


def evaluation_interval(steps: int) -> int:
    """Says after how many steps of a budget to evaluate."""
    return max(1, steps // EVALUATIONS)


def read_log(folder: Path) -> list[dict]:
    """Reads the lines that a training logged; none, if there was no training."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def evaluations(lines: Iterable[Mapping], seen: int = 0) -> list[dict[str, float]]:
    """Picks the evaluations out of a log; `seen` pairs were seen before it."""
    found = []
    for line in lines:
        metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        if metrics:
            found.append({"pairs": seen + line["pairs"], **metrics})
    return found


def last_metrics(curve: Curve) -> dict[str, float]:
    """Returns what a curve ends with, without the pairs."""
    return {name: value for name, value in curve[-1].items() if name != "pairs"}


def pairs_to_reach(curve: Curve, metric: str, target: float) -> float:
    """Finds the pairs after which a metric first reaches a target, on straight lines between evaluations; or inf."""
    if curve[0][metric] >= target:
        return curve[0]["pairs"]
    for before, after in pairwise(curve):
        if after[metric] >= target:
            share = (target - before[metric]) / (after[metric] - before[metric])
            return before["pairs"] + share * (after["pairs"] - before["pairs"])
    return math.inf


def value_at(curve: Curve, metric: str, pairs: float) -> float:
    """Interpolates a metric after some pairs, on straight lines between evaluations."""
    return float(np.interp(pairs, [point["pairs"] for point in curve], [point[metric] for point in curve]))
