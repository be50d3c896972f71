"""Cells, the results of a study: each is made once, of the settings that decide it, and read from then on."""

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from study.files import read_json, write_json


def cell_path(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Names the file of a cell: what it is about, for readers, and a checksum of all that decides it."""
    return folder / f"{name}-{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}.json"


def made_once(path: Path, make: Callable[[Path], dict], describe: Callable[[dict], str] | None = None) -> dict:
    """
    Reads a cell, which is made first if it is not there.

    Args:
        path: Where the cell lies, in a folder of the study's folder.
        make: Makes it in a folder to work in, where it finds what it left when it was stopped. The folder is removed
            when the cell is written.
        describe: Sums a new cell up in a few words, which are printed.
    """
    if not path.exists():
        work = path.parents[1] / "work" / path.stem
        cell = make(work)
        write_json(path, cell)
        shutil.rmtree(work, ignore_errors=True)
        if describe is not None:
            print(f"{path.stem}: {describe(cell)}", flush=True)
    return read_json(path)
