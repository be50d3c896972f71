"""Writes files completely or not at all: under a temporary name, synced to disk, and then renamed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError


__all__ = ["atomic_files", "atomic_folder", "read_json", "temporary_folder", "write_atomically", "write_json"]


_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container.cc", "iostream error")  # of torch.save on a full disk


def temporary_folder(folder: Path) -> Path:
    """Returns the folder that `atomic_folder` and `atomic_files` write to first. Killed processes leave it behind."""
    return folder.with_name(f".{folder.name}.tmp")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """
    Yields an empty folder to write to. When everything is written, it replaces `folder`.

    Raises:
        OSError: If it cannot be written. `folder` is then unchanged.
    """
    with _written(folder) as temporary:
        yield temporary
        _sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _sync_entry(folder.parent)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """
    Yields an empty folder to write to. When everything is written, its files are moved to `folder`, where they replace
    files of the same name.

    Raises:
        OSError: If the files cannot be written. `folder` is then unchanged.
    """
    with _written(folder / "files") as temporary:
        yield temporary
        _sync(temporary)
        for path in sorted(temporary.rglob("*")):
            target = folder / path.relative_to(temporary)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
        shutil.rmtree(temporary)
        _sync_entry(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """
    Writes a file. Several processes may write the same file at the same time.

    Raises:
        OSError: If the file cannot be written. An existing file is then unchanged.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        _sync_entry(partial)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _not_written(path, error) from error


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    temporary = temporary_folder(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        raise _not_written(folder.parent, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _not_written(path: Path, error: Exception) -> OSError:
    number = getattr(error, "errno", None)
    message = f"{path} could not be written ({error}). Existing files are unchanged; make room, or use another folder."
    return OSError(message) if number is None else OSError(number, message)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
