"""Selection by importance: the channels, heads and neurons with the most energy, LayerNorms as they are."""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.mapping.calibration import TowerStatistics
from clipmap_hf.mapping.towers import Tower


__all__ = ["head_channels", "importance", "kept_heads", "kept_neurons", "selection"]


def importance(
    statistics: Mapping[str, TowerStatistics], teacher: PreTrainedModel, student: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """
    One-hot width operators. A residual channel's energy is the sum over the tower's LayerNorms of the mean square that
    leaves them in it; a head's or a neuron's is that of what it adds to the stream.

    Args:
        statistics: Of the teacher, by tower.
        teacher: The teacher.
        student: The student's config.

    Returns:
        The operators by name, `(small, big)` or `(layers, small, big)`.
    """
    operators = {}
    for name, of_tower in statistics.items():
        tower, size = Tower(teacher, name), getattr(student, f"{name}_config")
        norms = [norm for layer in tower.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
        scales = torch.stack([norm.weight.double() for norm in (*norms, tower.final_norm)])
        energy = (scales.square() * of_tower.read.diagonal(dim1=1, dim2=2)).sum(dim=0)
        operators[f"{name}_residual"] = selection(_strongest(energy, size.hidden_size), len(energy))
        heads = selection(kept_heads(of_tower, size), tower.config.hidden_size)
        operators |= {f"{name}_{space}": heads for space in ("query", "key", "value")}
        neurons = selection(kept_neurons(of_tower, size), tower.config.intermediate_size)
        operators |= {f"{name}_{space}": neurons for space in ("ffn", "ffn_in")}
    if student.projection_dim < teacher.config.projection_dim:
        energy = sum(of_tower.embeds.diagonal() for of_tower in statistics.values())
        operators["embed"] = selection(_strongest(energy, student.projection_dim), len(energy))
    return operators


def kept_heads(statistics: TowerStatistics, student: PretrainedConfig) -> torch.Tensor:
    """The channels of each layer's strongest heads, as many as the student's tower has, `(layers, hidden_size)`."""
    heads = _strongest(statistics.head_energy, student.num_attention_heads)
    return head_channels(heads, student.hidden_size // student.num_attention_heads)


def head_channels(heads: torch.Tensor, width: int) -> torch.Tensor:
    """The channels `(..., heads * width)` of heads `(..., heads)` of a width."""
    return (heads[..., None] * width + torch.arange(width, device=heads.device)).flatten(-2)


def kept_neurons(statistics: TowerStatistics, student: PretrainedConfig) -> torch.Tensor:
    """Each layer's strongest neurons, as many as the student's tower has, `(layers, intermediate_size)`."""
    return _strongest(statistics.neuron_energy, student.intermediate_size)


def selection(indices: torch.Tensor, size: int) -> torch.Tensor:
    """The operator that keeps entries of a space, `(..., small, size)`."""
    return torch.nn.functional.one_hot(indices, size).float()


def _strongest(energy: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest along the last dimension, ascending."""
    return energy.topk(count).indices.sort().values
