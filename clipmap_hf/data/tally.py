"""Counts the rows that cannot be used, and stops where they are too many."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


__all__ = ["RowTally"]


@dataclass
class RowTally:
    """
    Counts rows.

    Args:
        max_bad_fraction: Rows that may be unusable, as a fraction of those read or of 1000, whichever is more.
        rows: Counted so far.

    Raises:
        ValueError: In `add`, once there are too many.
    """

    max_bad_fraction: float
    rows: int = 0

    def __post_init__(self):
        self.bad_rows = Counter()

    def add(self, rows: int, bad_rows: Mapping[str, int]) -> None:
        self.rows += rows
        self.bad_rows.update(bad_rows)
        if self.bad_rows.total() > self.max_bad_fraction * max(self.rows, 1000):
            raise ValueError(
                f"Of the first {self.rows} rows, {self.reasons()} cannot be used, more than "
                f"max_bad_fraction={self.max_bad_fraction} allows. Mend the data, or allow more."
            )

    def counting(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self.add(batch["rows"], batch["bad_rows"])
            yield batch

    def reasons(self) -> str:
        found = ", ".join(f"{number} {reason}" for reason, number in sorted(self.bad_rows.items()))
        return f"{self.bad_rows.total()} ({found})"
