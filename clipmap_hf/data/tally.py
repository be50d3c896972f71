"""Counts the rows that cannot be used, and raises an error if there are too many."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


__all__ = ["RowTally"]


@dataclass
class RowTally:
    """
    Counts the rows that were read, and those of them that cannot be used.

    Args:
        max_bad_fraction: Largest number of unusable rows, as a fraction of the rows read or of 1000 rows, whichever
            is more.
        rows: Number of rows read so far.

    Raises:
        ValueError: In `add`, if there are too many unusable rows.
    """

    max_bad_fraction: float
    rows: int = 0

    def __post_init__(self):
        self.bad_rows = Counter()

    def add(self, rows: int, bad_rows: Mapping[str, int]) -> None:
        """Counts further rows, of which `bad_rows` gives the number of unusable rows by reason."""
        self.rows += rows
        self.bad_rows.update(bad_rows)
        if self.bad_rows.total() > self.max_bad_fraction * max(self.rows, 1000):
            raise ValueError(
                f"Of the first {self.rows} rows, {self.reasons()} cannot be used, more than "
                f"max_bad_fraction={self.max_bad_fraction} allows. Repair the data, or allow more."
            )

    def counting(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields batches, and counts their `rows` and `bad_rows`."""
        for batch in batches:
            self.add(batch["rows"], batch["bad_rows"])
            yield batch

    def reasons(self) -> str:
        """Describes how many rows are unusable, and why."""
        found = ", ".join(f"{number} {reason}" for reason, number in sorted(self.bad_rows.items()))
        return f"{self.bad_rows.total()} ({found})"
