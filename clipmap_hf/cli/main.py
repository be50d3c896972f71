"""The command `clipmap-hf`: each recipe is a subcommand, and `env` prints versions and devices."""

import importlib
import re
import sys
from difflib import get_close_matches
from types import ModuleType

import clipmap_hf
from clipmap_hf.cli.shipped import load_recipe, recipe_summaries


__all__ = ["main"]

_PROGRAM = "clipmap-hf"
_OVERVIEW = """\
usage: {program} COMMAND [--config FILE] [--option value …]

Compresses CLIP models. `{program} COMMAND --help` shows the options of a command. For several processes, use
`accelerate launch -m clipmap_hf COMMAND …`.

commands:
{commands}

options:
  --help     show this list
  --version  show the version
"""
# How a docstring starts a recipe as a script, and how the command starts the same.
_AS_COMMAND = {
    r"accelerate launch recipes/(\w+)\.py": r"accelerate launch -m clipmap_hf \1",
    r"(?:python )?recipes/(\w+)\.py": rf"{_PROGRAM} \1",
    r"--config recipes/configs/([\w/]+)\.yaml": r"--config \1",
}


def main() -> None:
    """
    Runs the subcommand that the command line names.

    Raises:
        SystemExit: If there is no such subcommand.
    """
    commands = recipe_summaries() | {"env": "Prints versions and devices, for bug reports."}
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = (f"  {command:<{width}}  {summary}" for command, summary in commands.items())
        sys.stdout.write(_OVERVIEW.format(program=_PROGRAM, commands="\n".join(lines)))
    elif name == "--version":
        sys.stdout.write(f"{_PROGRAM} {clipmap_hf.__version__}\n")
    elif name in commands:
        sys.argv = [f"{_PROGRAM} {name}", *options]  # what a recipe calls itself in its help and errors
        _load(name).main()
    else:
        near = get_close_matches(name, [*commands, "--help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        sys.stderr.write(f"{_PROGRAM}: error: unknown command {name}; {hint}\n")
        raise SystemExit(2)


def _load(command: str) -> ModuleType:
    """Imports the module of a command, whose docstring is then about the command."""
    if command == "env":
        return importlib.import_module("clipmap_hf.cli.environment")
    module = load_recipe(command)
    for script, replacement in _AS_COMMAND.items():
        module.__doc__ = re.sub(script, replacement, module.__doc__)
    return module
