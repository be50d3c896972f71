"""Files that are there whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipmap_hf.files import atomic
from clipmap_hf.files.atomic import atomic_files, atomic_folder, temporary_folder, write_atomically


WAYS = {"folder": atomic_folder, "files": atomic_files}
each_way = pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with something in it."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("old a")
    (folder / "b").write_text("old b")
    (folder / "sub" / "c").write_text("old c")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OLD = {"a": "old a", "b": "old b", "sub/c": "old c"}


def fill(temporary: Path) -> None:
    (temporary / "a").write_text("new a")
    (temporary / "sub").mkdir()
    (temporary / "sub" / "d").write_text("new d")


NEW = {"a": "new a", "sub/d": "new d"}


# What is written


@pytest.mark.parametrize(("write", "expected"), [(atomic_folder, NEW), (atomic_files, OLD | NEW)], ids=list(WAYS))
def test_what_is_written_takes_the_place_of_what_was_there(folder, write, expected):
    with write(folder) as temporary:
        assert list(temporary.iterdir()) == []
        fill(temporary)
        assert contents(folder) == OLD or temporary.parent == folder  # not yet
        assert (folder / "a").read_text() == "old a"
    assert contents(folder) == expected
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@each_way
def test_a_folder_that_is_not_there_is_made_with_its_parents(tmp_path, write):
    folder = tmp_path / "new" / "out"
    with write(folder) as temporary:
        fill(temporary)
    assert contents(tmp_path) == {f"new/out/{name}": text for name, text in NEW.items()}


@each_way
def test_deep_sub_folders_are_written(tmp_path, write):
    with write(tmp_path / "out") as temporary:
        (temporary / "1" / "2" / "3").mkdir(parents=True)
        (temporary / "1" / "2" / "3" / "file").write_text("deep")
    assert contents(tmp_path) == {"out/1/2/3/file": "deep"}


@each_way
def test_everything_is_on_disk_before_it_is_renamed(folder, write, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_replace(source, target):
        if Path(source) == folder:  # what was there before, moved out of the way
            return replace(source, target)
        inodes = [path.stat().st_ino for path in [Path(source), *Path(source).rglob("*")]]
        events.append(("rename", set(inodes)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with write(folder) as temporary:
        fill(temporary)
    synced = set()
    for kind, what in events:
        if kind == "sync":
            synced.add(what)
        else:
            assert what <= synced
    assert events[-1][0] == "sync"  # the renaming itself, too


# What is not


@each_way
@pytest.mark.parametrize("error", [KeyError("key"), RuntimeError("shapes differ"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_everything_as_it_was_and_passes(folder, write, error):
    with pytest.raises(type(error)) as info, write(folder) as temporary:
        fill(temporary)
        raise error
    assert info.value is error
    assert contents(folder.parent) == {f"out/{name}": text for name, text in OLD.items()}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@each_way
def test_an_exception_leaves_no_folder_where_none_was(tmp_path, write):
    with pytest.raises(KeyError), write(tmp_path / "new" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@each_way
def test_an_error_of_the_disk_names_the_folder_and_what_to_do(folder, write):
    words = r"could not be written.*No space left on device.*make room"
    with pytest.raises(OSError, match=words) as info, write(folder) as temporary:
        fill(temporary)
        raise OSError(28, "No space left on device")
    place = folder.parent if write is atomic_folder else folder
    assert f"{place} could not" in str(info.value) and isinstance(info.value.__cause__, OSError)
    assert contents(folder.parent) == {f"out/{name}": text for name, text in OLD.items()}


@each_way
def test_an_error_while_syncing_leaves_everything_as_it_was(folder, write, monkeypatch):
    def fail(_folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic, "_sync", fail)
    with pytest.raises(OSError, match="could not be written.*Input/output error"), write(folder) as temporary:
        fill(temporary)
    assert contents(folder.parent) == {f"out/{name}": text for name, text in OLD.items()}


def in_the_way(folder: Path, name: str) -> None:
    """Puts something of the other kind where `fill` writes: a folder for a file, a file for a folder."""
    path = folder / name
    if path.is_dir():
        (path / "c").unlink()
        path.rmdir()
        path.write_text("in the way")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "kept").write_text("in the way")


@pytest.mark.parametrize("name", ["a", "sub", "sub/d", "z"])
def test_what_is_in_the_way_of_one_file_leaves_all_others_as_they_were(folder, name):
    in_the_way(folder, name)
    before = contents(folder)
    with (
        pytest.raises(OSError, match=f"could not be written .*{name}.*Existing files are unchanged"),
        atomic_files(folder) as temporary,
    ):
        fill(temporary)
        (temporary / "z").write_text("new z")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.rglob(".*")] == []


@pytest.fixture(params=["hard links", "copies"])
def way_to_keep(request, monkeypatch):
    """How what is replaced is kept until all is there; some file systems have no hard links."""

    def refuse(*_args, **_kwargs):
        raise PermissionError(1, "Operation not permitted")

    if request.param == "copies":
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("way_to_keep")
@pytest.mark.parametrize("failing", ["a", "sub/d", "sub2/e", "z"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_renaming_that_fails_takes_back_those_before(folder, monkeypatch, failing, error):
    replace, before = os.replace, sorted(folder.rglob("*"))

    def fails_once(source, target):
        if Path(target) == folder / failing:
            monkeypatch.setattr(os, "replace", replace)
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(type(error)), atomic_files(folder) as temporary:
        fill(temporary)
        (temporary / "sub2").mkdir()
        (temporary / "sub2" / "e").write_text("new e")
        (temporary / "z").write_text("new z")
    assert contents(folder) == OLD and sorted(folder.rglob("*")) == before
    with atomic_files(folder) as temporary:
        fill(temporary)
    assert contents(folder) == OLD | NEW


def test_a_link_is_replaced_not_what_it_points_to(folder, monkeypatch):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.write_text("elsewhere")
    (folder / "b").unlink()
    (folder / "b").symlink_to(elsewhere)
    with pytest.raises(IsADirectoryError), atomic_files(folder) as temporary:
        (temporary / "b").write_text("new b")
        (temporary / "sub").write_text("not a folder")
    assert (folder / "b").is_symlink()
    with atomic_files(folder) as temporary:
        (temporary / "b").write_text("new b")
    assert not (folder / "b").is_symlink() and (folder / "b").read_text() == "new b"
    assert elsewhere.read_text() == "elsewhere"


def test_a_folder_that_cannot_be_renamed_leaves_the_one_before(folder, monkeypatch):
    replace = os.replace

    def fails(source, target):
        if Path(source) == temporary_folder(folder):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Existing files are unchanged"), atomic_folder(folder) as temporary:
        fill(temporary)
    assert contents(folder.parent) == {f"out/{name}": text for name, text in OLD.items()}


def test_a_file_in_the_place_of_a_folder_stays(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OSError, match="Existing files are unchanged"), atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
    assert contents(tmp_path) == {"out": "x"}


@each_way
def test_a_place_that_is_a_file_is_an_error_that_names_it(tmp_path, write):
    (tmp_path / "file").write_text("x")
    words = f"{tmp_path / 'file'}.* could not be written"
    with pytest.raises(OSError, match=words), write(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "x"


@each_way
def test_what_a_killed_process_left_is_removed(folder, write):
    code = (
        "import os, sys; from pathlib import Path; from clipmap_hf.files.atomic import *\n"
        f"with {write.__name__}(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'left').write_text('half'); os._exit(9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(folder)], env=environment).returncode == 9
    left = temporary_folder(folder if write is atomic_folder else folder / "files")
    assert (left / "left").exists() and contents(folder).items() >= OLD.items()
    with write(folder) as temporary:
        assert temporary == left and list(temporary.iterdir()) == []
        fill(temporary)
    assert not left.exists() and "left" not in contents(folder)


# One file


def test_a_file_takes_the_place_of_the_one_before(folder):
    write_atomically(folder / "a", b"new a")
    write_atomically(folder / "new" / "sub" / "e", b"new e")
    assert contents(folder) == OLD | {"a": "new a", "new/sub/e": "new e"}


@pytest.mark.parametrize("name", ["write_bytes", "fsync", "replace"])
def test_a_file_that_cannot_be_written_is_as_it_was(folder, monkeypatch, name):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path if name == "write_bytes" else os, name, fail)
    with pytest.raises(OSError, match=r"could not be written.*No space left on device.*make room") as info:
        write_atomically(folder / "a", b"new a")
    assert str(folder / "a") in str(info.value) and info.value.errno == 28
    assert contents(folder) == OLD


# Real errors of what writes files

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from clipmap_hf.files.atomic import atomic_files, atomic_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tensors = {"weight": torch.zeros(100_000)}
writers = {
    "safetensors": lambda folder: save_file(tensors, folder / "file"),
    "torch.save": lambda folder: torch.save(tensors, folder / "file"),
    "write_text": lambda folder: (folder / "file").write_text("x" * 100_000),
    "folder": lambda folder: torch.save(tensors, folder / "missing" / "file"),
}
root = Path(sys.argv[1])
for way in (atomic_folder, atomic_files):
    for name, write in writers.items():
        folder = root / f"{way.__name__}-{name}"
        folder.mkdir()
        (folder / "file").write_text("old")
        try:
            with way(folder) as temporary:
                write(temporary)
            raise SystemExit(f"{name}: no error")
        except OSError as error:
            place = root if way is atomic_folder else folder
            assert f"{place} could not be written" in str(error), error
            assert error.__cause__ is not None
            print(name, type(error.__cause__).__name__)
        except RuntimeError as error:
            assert name == "folder", error  # nothing about a disk
        assert (folder / "file").read_text() == "old"
    assert not [path for path in root.rglob(".*")]
"""


def test_files_that_grow_too_large_are_errors_of_the_disk_whoever_writes_them(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    errors = set(result.stdout.splitlines())
    assert {"safetensors SafetensorError", "torch.save RuntimeError", "write_text OSError"} <= errors


# Windows


@pytest.fixture
def like_windows(monkeypatch):
    """Folders cannot be opened, files are synced by those who may write, and links are followed."""
    opened = {}

    def open_file(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = os.open(path, flags, *args, **kwargs)
        opened[descriptor] = flags
        return descriptor

    def sync(descriptor):
        if not opened.get(descriptor, os.O_RDWR) & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        os.fsync(descriptor)

    def link(source, target, *, follow_symlinks=True):
        if not follow_symlinks:
            raise NotImplementedError("link: follow_symlinks unavailable on this platform")
        os.link(source, target)

    monkeypatch.setattr(atomic, "_ON_WINDOWS", True)
    functions = vars(os) | {"open": open_file, "fsync": sync, "link": link}
    monkeypatch.setattr(atomic, "os", SimpleNamespace(**functions))


@pytest.mark.parametrize(("write", "expected"), [(atomic_folder, NEW), (atomic_files, OLD | NEW)], ids=list(WAYS))
def test_windows_needs_neither_open_folders_nor_hard_links(folder, like_windows, write, expected):
    with write(folder) as temporary:
        fill(temporary)
    assert contents(folder) == expected
    write_atomically(folder / "a", b"newer a")
    assert (folder / "a").read_text() == "newer a"
