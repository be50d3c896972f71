"""How much each channel of a ResNet counts, and the operators that keep those that count most."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.config.heads import head_width
from clipmap_hf.families import Family, TensorSpec, family_for
from clipmap_hf.starts.selection.scores import head_channels, selection, strongest


__all__ = ["ChannelScores", "channel_scores", "channel_scores_like", "keep_channels"]

_TOWER = "vision"


@dataclass
class ChannelScores:
    """
    Scores of a ResNet's channels; what counts more has a higher score. Only channels of a space are compared.

    Args:
        spaces: By space of the table, `(channels,)`, or `(layers, channels)` of one that every layer has of its own.
    """

    spaces: Mapping[str, torch.Tensor]

    def of_layers(self, spaces: Iterable[str]) -> torch.Tensor:
        """Returns the scores `(layers,)` of the layers that have these spaces: those of their channels together."""
        return sum(self.spaces[space].sum(dim=1) for space in spaces)


def channel_scores(teacher: PreTrainedModel, sums: Mapping[tuple, torch.Tensor]) -> ChannelScores:
    """
    Scores from sums over tensors: the absolute sum over what writes a channel in a layer, plus that over what reads
    it, added up over layers where these share a space.

    Args:
        teacher: The model.
        sums: By tower, layer and space, `(channels,)`, as `part_sums` makes them.
    """
    spaces = {}
    for space, layers in _spaces(teacher).items():
        found = {}
        for (tower, layer, other), total in sums.items():
            if tower == _TOWER and other.removesuffix(".in") == space:
                found[layer] = found.get(layer, 0) + total.abs()
        spaces[space] = torch.stack([found[layer] for layer in layers]) if layers else sum(found.values())
    return ChannelScores(spaces)


def channel_scores_like(teacher: PreTrainedModel, scores_of: Callable[[int], torch.Tensor]) -> ChannelScores:
    """
    Scores that follow from sizes.

    Args:
        teacher: The model.
        scores_of: From a number of channels to their scores.
    """
    family, spaces = family_for(teacher.config), {}
    for space, layers in _spaces(teacher).items():
        size = family.size(space, _TOWER, teacher.config)
        spaces[space] = torch.stack([scores_of(size) for _ in layers]) if layers else scores_of(size)
    return ChannelScores(spaces)


def keep_channels(
    scores: ChannelScores, family: Family, teacher: PretrainedConfig, student: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """
    One-hot width operators of the highest scores, as many in each space as the student has. The attention pool keeps
    whole heads, the same of queries, keys and values.

    Args:
        scores: Of the teacher's channels.
        family: The table.
        teacher: The teacher's config.
        student: The student's config.

    Returns:
        The operators by name, `(small, big)` or `(layers, small, big)`.
    """
    operators, in_heads = {}, [space for space in scores.spaces if space in family.head_spaces]
    for space, found in scores.spaces.items():
        small, big = (family.size(space, _TOWER, config) for config in (student, teacher))
        if space in in_heads:
            width = head_width(teacher.vision_config)
            total = sum(scores.spaces[other] for other in in_heads).unflatten(0, (-1, width)).sum(dim=1)
            kept = head_channels(strongest(total, small // width), width)
        else:
            kept = strongest(found, small)
        operators[f"{_TOWER}_{space}"] = selection(kept, big)
    return operators


def _spaces(teacher: PreTrainedModel) -> dict[str, range]:
    """The spaces of the tower, with the layers of which each has a part of its own; without any, none."""
    family, spaces = family_for(teacher.config), {}
    for spec in family.specs(teacher.state_dict(), teacher.config).values():
        if spec.tower == _TOWER:
            spaces |= {space: _layers(family, spec, space, teacher.config) for space in _own(family, spec)}
    return spaces


def _own(family: Family, spec: TensorSpec) -> set[str]:
    """The tower's own spaces among those of a tensor."""
    found = {space.removesuffix(".in") for space in spec.rule.axes if space is not None}
    return found - family.shared_spaces.keys()


def _layers(family: Family, spec: TensorSpec, space: str, config: PretrainedConfig) -> range:
    return family.layers(spec, config) if space in family.layer_spaces else range(0)
