"""Finds and reads the YAML file that `--config` means: a file, or one that ships with the recipes, by its name."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from clipmap_hf.cli.shipped import shipped_configs


__all__ = ["read_yaml", "yaml_path"]

_PACKAGE = Path(__file__).parents[1]


class _WordsLoader(yaml.SafeLoader):
    """Reads every value as the word that it is on the command line, but for what is left out (`null`)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(given: Path) -> tuple[Path, dict[str, Any]]:
    """
    Reads the file that `--config` means. Files of the package that a shipped one names, `clipmap_hf/demo/…`, are found
    from any working folder.

    Args:
        given: As for `yaml_path`.

    Returns:
        The path of the file, and its content.

    Raises:
        ValueError: If the file does not hold `key: value` lines.
        FileNotFoundError: If there is no such file.
    """
    path = yaml_path(given)
    content = yaml.load(path.read_text(encoding="utf-8"), _WordsLoader) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    if path != given:
        content = {key: _found(value) for key, value in content.items()}
    return path, content


def _found(value: Any) -> Any:
    folder = f"{_PACKAGE.name}/"
    is_of_the_package = isinstance(value, str) and value.startswith(folder)
    return str(_PACKAGE / value.removeprefix(folder)) if is_of_the_package else value


def yaml_path(given: Path) -> Path:
    """
    Returns the path of the file that `--config` means. A file in the working folder goes before a shipped one of the
    same name; a folder does not, because outputs often have such names.

    Args:
        given: The path of a file, or the name of a shipped one without its suffix: `small`, `paper/small`.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if given.exists() and not given.is_dir():
        return given
    shipped = shipped_configs()
    if given.as_posix() in shipped:
        return shipped[given.as_posix()]
    near = get_close_matches(given.with_suffix("").as_posix() if given.name else "", shipped, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"--config {given} is neither a file nor the name of a shipped configuration. {hint}"
        f"Give the path of a YAML file, or one of {list(shipped)}."
    )
