"""Writes files completely or not at all: under a temporary name, synced to disk, and then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError


__all__ = ["atomic_files", "atomic_folder", "read_json", "temporary_folder", "write_atomically", "write_json"]


_ON_WINDOWS = os.name == "nt"
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
        before = temporary_folder(temporary)
        with ExitStack() as undo:
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(before, ignore_errors=True)  # left by a killed process
                os.replace(folder, before)
                undo.callback(os.replace, before, folder)
            os.replace(temporary, folder)
            undo.pop_all()
        shutil.rmtree(before, ignore_errors=True)
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
        _move_all({path: folder / path.relative_to(temporary) for path in sorted(temporary.rglob("*"))}, temporary)
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


def _move_all(targets: Mapping[Path, Path], temporary: Path) -> None:
    """Moves files and makes folders, parents first. If one of them fails, all others are taken back."""
    for path, target in targets.items():
        _check_free(target, path.is_dir())
    kept = Path(mkdtemp(dir=temporary))
    copies = {path: kept / str(number) for number, path in enumerate(targets)}
    for path, target in targets.items():
        if not path.is_dir() and os.path.lexists(target):
            _keep(target, copies[path])
    with ExitStack() as undo:
        for path, target in targets.items():
            if not path.is_dir():
                os.replace(path, target)
                is_new = not os.path.lexists(copies[path])
                undo.callback(*((target.unlink,) if is_new else (os.replace, copies[path], target)))
            elif not target.exists():
                target.mkdir()
                undo.callback(target.rmdir)
        undo.pop_all()


def _check_free(target: Path, for_folder: bool) -> None:
    if for_folder and os.path.lexists(target) and not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file is in the way of a folder", str(target))
    if not for_folder and target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the way of a file", str(target))


def _keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):  # some file systems have no hard links, and Windows none of links
        shutil.copy2(path, copy, follow_symlinks=False)


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    temporary = temporary_folder(folder)
    missing = [parent for parent in temporary.parents if not os.path.lexists(parent)]
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir(parents=True)
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it was not made, or others have written to it
                parent.rmdir()
        if _is_of_the_disk(error):
            raise _not_written(folder.parent, error) from error
        raise


def _is_of_the_disk(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_CANNOT_WRITE)
    return isinstance(error, (OSError, SafetensorError))


def _not_written(path: Path, error: BaseException) -> OSError:
    number = getattr(error, "errno", None)
    message = f"{path} could not be written ({error}). Existing files are unchanged; make room, or use another folder."
    return OSError(message) if number is None else OSError(number, message)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    if _ON_WINDOWS and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if _ON_WINDOWS else os.O_RDONLY)  # it syncs for those who may write
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
