"""Finds what ships with the package: the recipes, and the YAML files that `--config` takes by name."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


__all__ = ["load_recipe", "recipe_summaries", "recipes_folder", "shipped_configs"]


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


def shipped_configs() -> dict[str, Path]:
    """Returns the YAML files that ship with the recipes, by names such as `small` and `paper/small`."""
    folder = recipes_folder() / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
