"""Finds what ships with the package: the recipes, and the YAML files that `--config` takes by name."""

import ast
import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType


__all__ = ["config_file", "load_recipe", "recipe_summaries", "recipes_folder"]


def recipes_folder() -> Path:
    """Returns the folder of the recipes. It is inside an installed package, and beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.with_name("recipes")


def recipe_summaries() -> dict[str, str]:
    """Returns the first line of each recipe's docstring, by the recipe's name. No recipe is imported."""
    return {path.stem: _first_line(path) for path in sorted(recipes_folder().glob("[a-z]*.py"))}


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.splitlines()[0]


def load_recipe(name: str) -> ModuleType:
    """
    Imports a recipe as `clipmap_hf.recipes.{name}`, from `recipes_folder`. An import by that name alone would take the
    recipes of whichever checkout is installed.

    Args:
        name: A key of `recipe_summaries`.
    """
    full_name = f"clipmap_hf.recipes.{name}"
    spec = importlib.util.spec_from_file_location(full_name, recipes_folder() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def config_file(given: Path) -> Path:
    """
    Returns the YAML file that `--config` means: a file, or one that ships with the recipes, such as `small` or
    `paper/small`. A file of the same name goes first; a folder does not, because outputs often have such names.

    Args:
        given: The path, or the name of a shipped file without its suffix.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if given.exists() and not given.is_dir():
        return given
    folder = recipes_folder() / "configs"
    shipped = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    name = given.as_posix()
    if name in shipped:
        return shipped[name]
    near = get_close_matches(name.removesuffix(".yaml"), shipped, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"--config {given} is neither a file nor the name of a shipped configuration. {hint}"
        f"Give the path of a YAML file, or one of {list(shipped)}."
    )
