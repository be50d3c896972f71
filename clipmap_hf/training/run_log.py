"""What tells how a run goes, in files: `arguments.yaml` and `metrics.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmap_hf.files.atomic import atomic_files


__all__ = ["RunLog"]


class RunLog:
    """
    Writes the log of a run.

    Args:
        folder: The output folder.
        writes: Whether this process writes; of several, the main process does.
    """

    def __init__(self, folder: Path, writes: bool):
        self.folder, self.writes = folder, writes
        self.file = folder / "metrics.jsonl"

    def open(self, length: int, recipe: str | None) -> None:
        """
        Cuts the log back to where the run is taken up, and writes what was asked.

        Args:
            length: Bytes of the log that stay.
            recipe: The resolved arguments as YAML, if they are known.
        """
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            with atomic_files(self.folder) as temporary:
                (temporary / "arguments.yaml").write_text(recipe, encoding="utf-8")
        with self.file.open("ab") as file:
            file.truncate(min(file.tell(), length))

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line."""
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def length(self) -> int:
        """Bytes of the log, 0 in a process that does not write it."""
        return self.file.stat().st_size if self.writes else 0
