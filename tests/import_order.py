"""
Which room of the package imports from which, and the order in which they may.

    python tests/import_order.py   # prints the picture
"""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1] / "clipmap_hf"

# From left to right: a module imports from its own room and from those before it.
ORDER = (
    ("files", "distributed"),
    ("config",),
    ("families",),
    ("models",),
    ("losses",),
    ("mapping",),
    ("data",),
    ("evaluation",),
    ("costs",),
    ("starts",),
    ("shapes",),
    ("ternary",),
    ("teacher_cache",),
    ("training",),
    ("export",),
    ("hub",),
    ("compressor",),
    ("pipeline",),
    ("cli",),
    ("demo",),
    ("__main__",),
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(path: Path) -> str:
    """The room that a module belongs to: `mapping`, `config`, …"""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module imports from, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "clipmap_hf"}
    return {name.split(".")[1] for name in names if name.startswith("clipmap_hf.")}


def picture() -> str:
    """A row for each room, with its modules and lines, and a mark under every room that it imports from."""
    rooms = [room for rank in ORDER for room in rank]
    lines = [f"{'room':<14}{'modules':>8}{'lines':>7}  " + " ".join(f"{rank:>2}" for rank in range(len(rooms)))]
    for rank, room in enumerate(rooms):
        modules = [path for path in sorted(ROOT.rglob("*.py")) if room_of(path) == room]
        count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules)
        imported = set().union(*map(imported_rooms, modules)) - {room}
        marks = " ".join(" ●" if other in imported else " ·" if rooms.index(other) < rank else "  " for other in rooms)
        lines.append(f"{rank:>2} {room:<11}{len(modules):>8}{count:>7}  {marks.rstrip()}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(picture())
