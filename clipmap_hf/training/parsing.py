"""Reads the dataclasses of `arguments.py` from a YAML file and the command line, which wins; and back into YAML."""

import argparse
import dataclasses
import sys
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import yaml


__all__ = ["arguments_yaml", "optional", "parse_arguments"]


_NUMBERS = dict[str, float]  # on the command line: name=number name=number


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
        One instance per dataclass type, then one per stage.

    Raises:
        ValueError: If the YAML file has a key that no dataclass knows.
    """
    from transformers import HfArgumentParser  # seconds to import on a cold disk, and only needed here

    stages = stages or {}
    prefixed = [_with_prefix(name, stage) for name, stage in stages.items()]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, help="YAML file with values for these options; the command line wins")
    config, argv = finder.parse_known_args(sys.argv[1:] if argv is None else argv)
    if config.config is not None:
        known = {f.name for one in [*dataclass_types, *prefixed] for f in dataclasses.fields(one)}
        ignored = {f.name for one in others for f in dataclasses.fields(one)} - known
        argv = _yaml_options(config.config, known, ignored, {**stages, **(other_stages or {})}, stages) + argv
    parser = HfArgumentParser(
        [*dataclass_types, *prefixed],
        description=description,
        parents=[finder],
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    plain, staged = parsed[: len(dataclass_types)], parsed[len(dataclass_types) :]
    return *plain, *(
        stage(**{f.name: _value(f, getattr(values, f"{name}_{f.name}")) for f in dataclasses.fields(stage)})
        for (name, stage), values in zip(stages.items(), staged, strict=False)  # a namespace with `config` comes last
    )


def arguments_yaml(*arguments: Any, **stages: Any) -> str:
    """Resolved arguments as YAML that `--config` reads back; `stages` become sections under their names."""
    plain = {key: value for one in arguments for key, value in dataclasses.asdict(one).items()}
    content = {key: value for key, value in plain.items() if value != []}  # an option takes at least one value
    content |= {name: dataclasses.asdict(one) for name, one in stages.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def optional(stage: type) -> type:
    """The dataclass of a stage that is left out unless its epochs or steps are given."""
    none = field(default=0.0, metadata={"help": "Passes over the training data; by default none."})
    return dataclasses.make_dataclass(f"Optional{stage.__name__}", [("epochs", float, none)], bases=(stage,))


def _yaml_options(
    path: Path, known: set[str], ignored: set[str], sections: dict[str, type], own: dict[str, type]
) -> list[str]:
    """The file's values as command-line options, so that both are converted and checked by one parser."""
    content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    options = []
    for key, value in content.items():
        if key in sections:
            if not isinstance(value or {}, dict):
                raise ValueError(f"{path}: section {key!r} must hold `key: value` lines, got {value!r}.")
            allowed = {f.name for f in dataclasses.fields(sections[key])}
            _check_known(path, value or {}, allowed, f" in section {key!r}")
            if key in own:
                numbers = {f.name for f in dataclasses.fields(own[key]) if f.type == _NUMBERS}
                for name, inner in (value or {}).items():
                    words = _as_words(inner) if name in numbers and isinstance(inner, dict) else inner
                    options += _option(f"{key}_{name}", words)
        elif key not in ignored:
            _check_known(path, {key}, known | set(sections), "")
            options += _option(key, value)
    return options


def _check_known(path: Path, keys: Any, allowed: set[str], where: str) -> None:
    unknown = sorted(set(map(str, keys)) - allowed)
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}{where}; allowed are {sorted(allowed)}.")


def _option(name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        raise ValueError(f"The option {name!r} takes a value or a list, got the mapping {value!r}.")
    return [f"--{name}", *(_word(one) for one in (value if isinstance(value, list) else [value]))]


def _word(value: Any) -> str:
    """A value on the command line; a mapping in a list is one word."""
    return ",".join(_as_words(value)) if isinstance(value, dict) else str(value)


def _with_prefix(name: str, stage: type) -> type:
    """
    A copy of the dataclass `stage` (whose fields are scalars, or numbers by name) with every field renamed
    `{name}_{field}`, and numbers by name as words.
    """
    fields = [
        (
            f"{name}_{f.name}",
            list[str],
            field(default_factory=partial(_as_words, f.default_factory()), metadata=f.metadata),
        )
        if f.type == _NUMBERS
        else (f"{name}_{f.name}", f.type, field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(stage)
    ]
    return dataclasses.make_dataclass(f"{name.title()}{stage.__name__}", fields, namespace={"__module__": __name__})


def _as_words(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _value(of: dataclasses.Field, parsed: Any) -> Any:
    """What an option stands for; numbers by name came as words."""
    if of.type != _NUMBERS:
        return parsed
    numbers = {}
    for word in parsed:
        name, _, number = word.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise ValueError(f"{of.name} takes words like name=0.5, got {word!r}.") from None
    return numbers
