"""The report of a study: all results as they are, and sections of tables."""

from collections.abc import Sequence
from pathlib import Path

from study.files import write_json

from clipmap_hf.files.atomic import write_atomically


def write_report(folder: Path, results: Sequence[dict], sections: Sequence[str]) -> str:
    """
    Writes `results.json` and `results.md`.

    Args:
        folder: Of the study.
        results: What the tables were made of.
        sections: Headings and tables.

    Returns:
        The content of `results.md`.
    """
    write_json(folder / "results.json", results)
    report = "\n\n".join(sections) + "\n"
    write_atomically(folder / "results.md", report.encode())
    return report
