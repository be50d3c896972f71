"""Tables over seeds, in Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Writes mean ± standard deviation of all seeds; `–` if a seed has no number."""
    if not values or not all(map(math.isfinite, values)):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Lays rows out as a table, without the columns that hold nothing."""
    columns = [column for column in rows[0] if any(row[column] != "–" for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
