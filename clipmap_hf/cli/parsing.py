"""Reads the dataclasses of `arguments.py` from a YAML file and the command line, which wins; and back into YAML."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from clipmap_hf.cli.yaml_file import read_yaml
from clipmap_hf.config.json_values import json_values


__all__ = ["arguments_yaml", "optional", "parse_arguments"]


# Fields of these types are words on the command line: name=number …, and a name or name=value ….
_NUMBERS, _NAME_OR_VALUES = dict[str, float | Callable] | None, str | dict[str, str] | None


_SWITCHES = {"on": "true", "off": "false"}  # beside the words for them that the parser knows


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of a recipe's examples as they are."""


def parse_arguments(
    *dataclass_types: type,
    stages: dict[str, type] | None = None,
    others: tuple[type, ...] = (),
    other_stages: dict[str, type] | None = None,
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple:
    """
    Reads dataclasses from the command line and from `--config file.yaml`; the command line wins.

    Args:
        dataclass_types: Flat dataclasses whose fields become `--options` and top-level YAML keys.
        stages: `{name: dataclass}` whose fields become `--{name}_{option}` and keys of the YAML section `name:`.
        others: Dataclasses of another recipe that reads the same YAML; their keys are known there, and left alone.
        other_stages: Sections of another recipe that reads the same YAML; their keys are checked, and left alone.
        description: Shown by `--help`.
        argv: Arguments instead of `sys.argv[1:]`.

    Returns:
        An instance of each dataclass type, then of each stage.

    Raises:
        ValueError: If the YAML file has a key that no dataclass knows, or a value is not allowed. On a real command
            line (`argv` is `None`), the process ends with one line that says so instead, and exit code 2.
        FileNotFoundError: If `--config` is neither a file nor the name of a shipped one; on a real command line as
            above.
        ImportError: If a dataclass misses a package that its recipe needs; on a real command line as above.
        SystemExit: If an option is unknown, missing or of the wrong type.
    """
    reading = partial(_read, dataclass_types, stages or {}, others, other_stages or {}, description)
    if argv is not None:
        return reading(argv)
    try:
        return reading(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        raise SystemExit(2) from error


def _read(
    dataclass_types: tuple[type, ...],
    stages: dict[str, type],
    others: tuple[type, ...],
    other_stages: dict[str, type],
    description: str | None,
    argv: list[str],
) -> tuple:
    from transformers import HfArgumentParser  # seconds to import on a cold disk, and only needed here

    class Parser(HfArgumentParser):
        """Ends with one line instead of the usage, which is as long as the list of options."""

        def error(self, message: str) -> None:
            self.exit(2, f"{self.prog}: error: {message}\n")

    asked = [*(("", kind) for kind in dataclass_types), *((f"{name}_", stage) for name, stage in stages.items())]
    as_options = [_as_options(prefix, kind) for prefix, kind in asked]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    said = "YAML file with values for these options, or the name of a shipped one (small); the command line wins"
    finder.add_argument("--config", type=Path, help=said)
    config, argv = finder.parse_known_args(argv)
    if config.config is not None:
        known = {f"{prefix}{name}": f for prefix, kind in asked for name, f in _keys(kind).items()}
        ignored = {name for kind in others for name in _keys(kind)} - known.keys()
        argv = _yaml_options(config.config, known, ignored, {**stages, **other_stages}, stages) + argv
    parser = Parser(
        as_options,
        prog=Path(sys.argv[0]).name,
        usage="%(prog)s [--config FILE] [--option value …]",
        description=description,
        parents=[finder],
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    options = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        if word.startswith("--") and (name := word.split("=")[0]) not in options:
            parser.error(f"unknown option {name}; {_nearest(name, options, stages)}")
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(
        kind(**{f.name: _value(f, getattr(values, f"{prefix}{f.name}")) for f in dataclasses.fields(kind)})
        for (prefix, kind), values in zip(asked, parsed, strict=False)  # a namespace with `config` comes last
    )


def _nearest(word: str, options: list[str], stages: Iterable[str]) -> str:
    """Says which option was meant: that of a stage, if its prefix is missing, or the most similar word."""
    name = word.removeprefix("--")
    near = [option for stage in stages if (option := f"--{stage}_{name}") in options]
    near = near or get_close_matches(word, options, n=1)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists all"


def arguments_yaml(*arguments: Any, **stages: Any) -> str:
    """Resolved arguments as YAML that `--config` reads back; `stages` become sections under their names."""
    plain = {key: value for values in arguments for key, value in json_values(values).items()}
    content = {key: value for key, value in plain.items() if value != []}  # an option takes at least one value
    content |= {name: json_values(stage) for name, stage in stages.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def optional(stage: type) -> type:
    """The dataclass of a stage that is left out unless its epochs or steps are given."""
    said = {"aliases": "--epochs", "help": "Passes over the training data; by default none."}
    none = field(default=0.0, metadata=said)
    return dataclasses.make_dataclass(f"Optional{stage.__name__}", [("num_train_epochs", float, none)], bases=(stage,))


def _yaml_options(
    given: Path,
    known: dict[str, dataclasses.Field],
    ignored: set[str],
    sections: dict[str, type],
    own: dict[str, type],
) -> list[str]:
    """The file's values as command-line options, so that both are converted and checked by one parser."""
    path, content = read_yaml(given)
    options = []
    for key, value in content.items():
        if key in sections:
            if not isinstance(value or {}, dict):
                raise ValueError(f"{path}: section {key!r} must hold `key: value` lines, got {value!r}.")
            _check_known(path, value or {}, set(_keys(sections[key])), f" in section {key!r}")
            if key in own:
                for name, inner in (value or {}).items():
                    options += _option(known[f"{key}_{name}"], f"{key}_{name}", inner)
        elif key not in ignored:
            _check_known(path, {key}, known.keys() | set(sections), "")
            options += _option(known[key], key, value)
    return options


def _check_known(path: Path, keys: Any, allowed: set[str], where: str) -> None:
    unknown = sorted(set(map(str, keys)) - allowed)
    if unknown:
        near = get_close_matches(unknown[0], sorted(allowed), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed are {sorted(allowed)}."
        raise ValueError(f"{path}: unknown keys {unknown}{where}; {hint}")


def _option(of: dataclasses.Field, name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, dict) and of.type in (_NUMBERS, _NAME_OR_VALUES):
        value = _as_words(value)
    if isinstance(value, dict):
        raise ValueError(f"The option {name!r} takes a value or a list, got the mapping {value!r}.")
    if isinstance(value, list) and None in value:
        raise ValueError(f"The list of {name!r} has an entry that is null: {value}. Leave it out.")
    if of.type in (bool, bool | None) and isinstance(value, str):
        value = _SWITCHES.get(value.lower(), value)
    return [f"--{name}", *(_word(item) for item in (value if isinstance(value, list) else [value]))]


def _word(value: Any) -> str:
    """A value on the command line; a mapping in a list is one word."""
    return ",".join(_as_words(value)) if isinstance(value, dict) else str(value)


def _as_options(prefix: str, cls: type) -> type:
    """A copy of a dataclass, without its checks, with every field renamed `{prefix}{field}`, and mappings as words."""
    fields = []
    for f in dataclasses.fields(cls):
        options = {"metadata": f.metadata, "default": f.default, "default_factory": f.default_factory}
        words = f.type in (_NUMBERS, _NAME_OR_VALUES)
        if words:
            options |= {"default": dataclasses.MISSING, "default_factory": list}
        if aliases := _aliases(f):
            options["metadata"] = {**f.metadata, "aliases": [f"--{prefix}{alias}" for alias in aliases]}
        fields.append((f"{prefix}{f.name}", list[str] if words else f.type, field(**options)))
    has_words = cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")  # which dataclasses make up
    title = cls.__doc__.strip().splitlines()[0].rstrip(".") if has_words else "This recipe's own options"
    group = {"_argument_group_name": f"{prefix.removesuffix('_')}: {title}" if prefix else title}
    return dataclasses.make_dataclass(f"{cls.__name__}Options", fields, namespace={"__module__": __name__, **group})


def _aliases(of: dataclasses.Field) -> list[str]:
    """The names that a field has beside its own, without dashes."""
    aliases = of.metadata.get("aliases", [])
    return [alias.removeprefix("--") for alias in ([aliases] if isinstance(aliases, str) else aliases)]


def _keys(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by all of their names."""
    return {name: f for f in dataclasses.fields(kind) for name in (f.name, *_aliases(f))}


def _as_words(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _value(of: dataclasses.Field, parsed: Any) -> Any:
    """What an option stands for; mappings came as words."""
    if of.type == _NAME_OR_VALUES:
        return _name_or_values(of.name, parsed)
    if of.type != _NUMBERS:
        return parsed
    numbers = {}
    for word in parsed:
        name, _, number = word.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise ValueError(f"{of.name} takes words like name=0.5, got {word!r}.") from None
    return numbers or None


def _name_or_values(option: str, words: list[str]) -> str | dict[str, str] | None:
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    if not all("=" in word for word in words):
        raise ValueError(f"{option} takes one name, or words like name=value, got {words}.")
    return dict(word.split("=", 1) for word in words) or None
