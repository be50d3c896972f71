"""JSON files of a study: written whole or not at all, with keys in the order that they have in memory."""

import json
from pathlib import Path
from typing import Any

from clipmap_hf.files.atomic import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Writes JSON values in their own order, which reports show: that of losses, methods and sizes."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
