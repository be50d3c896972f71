"""From arguments to the student that they ask for: a preset, sizes or a budget as a `ClipMapConfig`."""

import dataclasses

import yaml

from clipmap_hf.cli.arguments import StudentArguments
from clipmap_hf.config import PRESETS, Budget, ClipMapConfig, ResNetTowerConfig, TowerConfig


__all__ = ["map_config", "with_size"]


def map_config(arguments: StudentArguments, seed: int = 0) -> ClipMapConfig | None:
    """
    The preset or the budget that the arguments name, with their sizes and options; `None` if they say nothing.

    Args:
        arguments: What was given.
        seed: Of random initializers.

    Raises:
        ValueError: If the preset is unknown, or the budget none.
    """
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}
    if not given:
        return None
    preset = given.pop("student", None)
    if isinstance(preset, dict):
        preset, given["budget"] = None, preset
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"student={preset!r} is unknown; the presets are {sorted(PRESETS)}.")
    config = ClipMapConfig() if preset is None else PRESETS[preset]
    names = {f.name for kind in (TowerConfig, ResNetTowerConfig) for f in dataclasses.fields(kind)}
    for tower in ("vision", "text"):
        sizes = {name: given.pop(f"{tower}_{name}") for name in names if f"{tower}_{name}" in given}
        of_resnet = [f.name for f in dataclasses.fields(ResNetTowerConfig) if f.name in sizes]
        if of_resnet and len(of_resnet) < len(sizes):
            raise ValueError(
                f"The {tower} tower's size is given by {sorted(sizes)}; of these, {of_resnet} are a ResNet's."
            )
        kind = ResNetTowerConfig if of_resnet else TowerConfig
        size = getattr(config, tower)
        given[tower] = dataclasses.replace(size if isinstance(size, kind) or not sizes else kind(), **sizes)
    return dataclasses.replace(config, seed=seed, **given)


def with_size(arguments: StudentArguments, size: str) -> StudentArguments:
    """
    Arguments with another size.

    Args:
        arguments: What all sizes have in common.
        size: A preset, or `option=value,option=value` with the options of `StudentArguments` or the measures of a
            `Budget`.

    Raises:
        ValueError: If there is no such option, or it has no value.
    """
    if "=" not in size:
        return dataclasses.replace(arguments, student=size)
    options, measures = ([f.name for f in dataclasses.fields(kind)] for kind in (arguments, Budget))
    values, budget = {}, {}
    for word in size.split(","):
        name, _, value = word.partition("=")
        if name not in (*options, *measures) or not value:
            allowed = [*options, *measures]
            raise ValueError(f"The size {size!r} has {word!r}; it takes option=value, with an option of {allowed}.")
        (values if name in options else budget)[name] = yaml.safe_load(value)
    if budget and "student" in values:
        raise ValueError(f"The size {size!r} has a preset and a budget; give one of them.")
    return dataclasses.replace(arguments, **values, **({"student": budget} if budget else {}))
