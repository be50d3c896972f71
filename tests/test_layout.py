"""The house rules of CONTRIBUTING.md that a machine can check."""

import ast
from pathlib import Path

import pytest
from import_order import ORDER, RANKS, ROOT, imported_rooms, picture, room_of


REPOSITORY = ROOT.parent
MODULES = sorted(ROOT.rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(path: Path) -> list[str] | None:
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def as_ruff_sorts(names: list[str]) -> list[str]:
    """Constants, then classes, then functions."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@each_module
def test_imports_go_one_way(path):
    if path == ROOT / "__init__.py":
        return  # its lazy imports are checked in test_public_api.py
    assert room_of(path) in RANKS, (
        f"{room_of(path)} has no place in ORDER; give it one, and write it into CONTRIBUTING.md"
    )
    wrong = {other for other in imported_rooms(path) if RANKS[other] > RANKS[room_of(path)]}
    assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}, which stand to its right"


def test_only_what_runs_whole_recipes_knows_the_facade():
    users = {room_of(path) for path in MODULES if "compressor" in imported_rooms(path)}
    assert users - {"compressor"} <= {"pipeline", "demo", "__init__"}


def test_the_check_of_imports_sees_imports():
    assert {"config", "families", "mapping"} <= imported_rooms(ROOT / "mapping" / "plan.py")
    assert "hub" in imported_rooms(ROOT / "compressor.py")


@each_module
def test_a_module_says_in_its_first_line_what_it_does(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""') and len(first) > 15


@each_module
def test_a_module_lists_its_public_names(path):
    names, body = public_names(path), tree(path).body
    if path.name == "__init__.py" and len(body) == 1:
        return  # nothing but its docstring
    assert names, f"{path.relative_to(ROOT)} has no __all__"
    assert names == as_ruff_sorts(names)
    if path == ROOT / "__init__.py":
        return  # lazily defined; checked in test_public_api.py
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            defined |= {
                one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
            }
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert set(names) <= defined


@each_module
def test_a_module_is_named_for_what_it_does(path):
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
    assert path.parent.name not in {"utils", "util", "helpers", "misc", "common"}


@each_module
def test_a_module_does_not_print(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if getattr(call.func, "id", None) == "print"]


@pytest.mark.parametrize(
    "path",
    [*MODULES, *sorted((REPOSITORY / "recipes").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_files_and_functions_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = {}
    for node in functions:
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        lines[node.name] = node.end_lineno - first.lineno + 1  # without signature and docstring
    assert not {name: count for name, count in lines.items() if count > 50}


@pytest.mark.parametrize(
    "path",
    [*MODULES, *sorted((REPOSITORY / "recipes").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_text_files_are_utf_8_on_every_system(path):
    """Windows would read and write them in a code page of its own."""
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    text = [call for call in calls if getattr(call.func, "attr", None) in ("read_text", "write_text")]
    for call in calls:
        is_builtin, is_method = (getattr(call.func, key, None) == "open" for key in ("id", "attr"))
        modes = call.args[1:2] if is_builtin else call.args[:1] if is_method else []
        text += [call for mode in modes if getattr(mode, "value", None) in ("r", "w", "a", "x")]
    assert not [call.lineno for call in text if "encoding" not in {keyword.arg for keyword in call.keywords}]


POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


@each_module
def test_a_module_is_imported_on_every_system(path):
    """What only Unix has is imported where it is used, and no path of Linux is written without a question."""
    heads = [node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in heads for alias in node.names} | {getattr(node, "module", None) for node in heads}
    assert not names & POSIX_ONLY
    strings = [node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)]
    assert not [text for text in strings if isinstance(text, str) and text.startswith(("/dev/", "/tmp", "/var"))]


def test_the_order_of_imports_is_the_one_that_contributing_gives():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if " → " in line and "families" in line)
    written = [name for name in line.split(" → ") if name in RANKS]
    assert len(written) > 5
    assert [RANKS[name] for name in written] == sorted(RANKS[name] for name in written)


def test_every_folder_of_the_package_has_its_place_in_the_order():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms |= {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert rooms == set(RANKS)


def test_the_root_keeps_the_facade_the_command_and_what_processes_exchange():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "compressor.py",
        "distributed.py",
    }


def test_the_picture_has_a_row_for_each_room():
    assert [line.split()[1] for line in picture().splitlines()[1:]] == [room for rank in ORDER for room in rank]
