"""Chooses learning rates by trials, and keeps what was found in a study's `tuned.json`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from study.files import read_json, write_json


def best_trial(rates: Iterable[float], recall: Callable[[float], float]) -> tuple[float, float]:
    """Tries rates, and returns that with the highest recall, or the first of several, and this recall."""
    recalls = {rate: recall(rate) for rate in rates}
    rate = max(recalls, key=recalls.get)
    return rate, recalls[rate]


def read_tuned(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads what was found, by size and method; nothing before tuning."""
    path = folder / "tuned.json"
    return read_json(path) if path.exists() else {}


def keep_tuned(folder: Path, size: str, method: str, found: Any) -> None:
    """Adds what was found for a method; what other processes found of other sizes stays there."""
    tuned = read_tuned(folder)
    tuned.setdefault(size, {})[method] = found
    write_json(folder / "tuned.json", tuned)
