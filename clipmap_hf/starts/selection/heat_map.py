"""Pruning errors to look at and to keep: a heat map in text, and plain JSON values."""

from collections.abc import Mapping
from typing import Any

import torch

from clipmap_hf.starts.selection.mope import PruningErrors


__all__ = ["errors_to_dict", "heat_map"]

_SHADES = " ░▒▓█"


def errors_to_dict(errors: Mapping[str, PruningErrors]) -> dict[str, dict[str, Any]]:
    """The errors of each tower as JSON values: `{"vision": {"heads": [[…]], "groups": [[…]], "layers": […]}, …}`."""
    return {name: {part: tensor.tolist() for part, tensor in vars(found).items()} for name, found in errors.items()}


def heat_map(errors: Mapping[str, PruningErrors]) -> str:
    """
    Renders the errors as text: a line for each layer, with what mean recall loses without each of its heads, each
    group of its neurons (the most important first) and without all of it, in percent points. The darker, the more, on
    one scale for heads and groups and another for layers.

    Args:
        errors: Of each tower, as `pruning_errors` gives them.
    """
    return "\n\n".join(f"{name}\n{_table(found)}" for name, found in errors.items())


def _table(errors: PruningErrors) -> str:
    modules = torch.cat([errors.heads, errors.groups], dim=1)
    names = [f"head {index}" for index in range(errors.heads.shape[1])]
    names += [f"group {index}" for index in range(errors.groups.shape[1])]
    rows = [["layer", *names, "whole"]]
    for index, (inside, whole) in enumerate(zip(_cells(modules), _cells(errors.layers[:, None]), strict=True)):
        rows.append([str(index), *inside, *whole])
    return "\n".join(" ".join(f"{cell:>8}" for cell in row) for row in rows)


def _cells(values: torch.Tensor) -> list[list[str]]:
    shades = (values.clamp(min=0) / values.max().clamp(min=1e-30) * (len(_SHADES) - 1)).round().int().tolist()
    return [
        [f"{100 * value:.1f} {_SHADES[shade]}" for value, shade in zip(row, shaded, strict=True)]
        for row, shaded in zip(values.tolist(), shades, strict=True)
    ]
