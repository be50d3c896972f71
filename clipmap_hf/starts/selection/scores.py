"""How much each part of a teacher counts, and the operators that keep what counts most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from clipmap_hf.config import cut_towers, embedding_width
from clipmap_hf.config.heads import head_width


__all__ = ["Scores", "TowerScores", "head_channels", "keep", "selection", "strongest"]


@dataclass
class TowerScores:
    """
    Scores of a tower's parts; what counts more has a higher score. Only parts of a kind are compared: channels with
    channels, heads and neurons with those of their layer, layers with layers.

    Args:
        channels: Of the residual stream, `(hidden_size,)`.
        heads: `(layers, heads)`.
        neurons: `(layers, intermediate_size)`.
        layers: `(layers,)`.
        pool_heads: Of a pooling head's own heads, `(heads,)`.
        pool_neurons: `(intermediate_size,)`.
        inner: Of the channels within heads, `(layers, hidden_size)`, for heads that become narrower; `None` if heads
            are kept whole only.
        pool_inner: Of the channels within the pooling head's heads, `(hidden_size,)`.
    """

    channels: torch.Tensor
    heads: torch.Tensor
    neurons: torch.Tensor
    layers: torch.Tensor
    pool_heads: torch.Tensor | None = None
    pool_neurons: torch.Tensor | None = None
    inner: torch.Tensor | None = None
    pool_inner: torch.Tensor | None = None


@dataclass
class Scores:
    """
    Scores of both towers' parts.

    Args:
        vision: Of the vision tower, if that is cut; of a ResNet, `ChannelScores`.
        text: Of the text tower, if that is cut.
        embed: Of the joint embedding's dimensions, `(projection_dim,)`.
    """

    vision: Any
    text: TowerScores | None
    embed: torch.Tensor


def keep(scores: Scores, teacher: PretrainedConfig, student: PretrainedConfig) -> dict[str, torch.Tensor]:
    """
    One-hot width operators of the highest scores, as many in each layer as the student has, of transformers that are
    cut.

    Args:
        scores: Of the teacher's parts.
        teacher: The teacher's config.
        student: The student's config.

    Returns:
        The operators by name, `(small, big)` or `(layers, small, big)`.
    """
    operators = {}
    for name in cut_towers(teacher, student):
        if not isinstance(getattr(scores, name), TowerScores):  # of a ResNet, see `keep_channels`
            continue
        found, (big, small) = getattr(scores, name), (getattr(model, f"{name}_config") for model in (teacher, student))
        operators[f"{name}_residual"] = selection(strongest(found.channels, small.hidden_size), big.hidden_size)
        heads = selection(_kept_channels(found.heads, found.inner, big, small), big.hidden_size)
        neurons = selection(strongest(found.neurons, small.intermediate_size), big.intermediate_size)
        operators |= {f"{name}_{space}": heads for space in ("query", "key", "value")}
        operators |= {f"{name}_{space}": neurons for space in ("ffn", "ffn_in")}
        if found.pool_heads is not None:
            heads = _kept_channels(found.pool_heads, found.pool_inner, big, small)
            neurons = strongest(found.pool_neurons, small.intermediate_size)
            operators[f"{name}_pool"] = selection(heads, big.hidden_size)
            operators[f"{name}_pool_ffn"] = selection(neurons, big.intermediate_size)
    if (embeds := embedding_width(student)) < embedding_width(teacher):
        operators["embed"] = selection(strongest(scores.embed, embeds), embedding_width(teacher))
    return operators


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the highest along the last dimension, ascending; of equal ones, the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort().values


def _kept_channels(
    heads: torch.Tensor, inner: torch.Tensor | None, big: PretrainedConfig, small: PretrainedConfig
) -> torch.Tensor:
    """The channels of the strongest heads; of heads that become narrower, the strongest channels within."""
    kept, width = strongest(heads, small.num_attention_heads), head_width(big)
    if head_width(small) == width:
        return head_channels(kept, width)
    within = strongest(inner.unflatten(-1, (-1, width)), head_width(small))  # (..., heads, channels kept)
    return (kept[..., None] * width + within.take_along_dim(kept[..., None], dim=-2)).flatten(-2)


def head_channels(heads: torch.Tensor, width: int) -> torch.Tensor:
    """The channels `(..., heads * width)` of heads `(..., heads)` of a width."""
    return (heads[..., None] * width + torch.arange(width, device=heads.device)).flatten(-2)


def selection(indices: torch.Tensor, size: int) -> torch.Tensor:
    """The operator that keeps entries of a space, `(..., small, size)`."""
    return F.one_hot(indices, size).float()
