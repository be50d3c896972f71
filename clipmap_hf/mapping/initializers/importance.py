"""Selection by importance: the channels, heads and neurons with the most energy, LayerNorms as they are."""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.mapping.calibration import TowerStatistics
from clipmap_hf.mapping.scores import Scores, TowerScores, keep
from clipmap_hf.mapping.towers import Tower


__all__ = ["importance"]


def importance(
    statistics: Mapping[str, TowerStatistics], teacher: PreTrainedModel, student: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """
    One-hot width operators. A residual channel's energy is the sum over the tower's LayerNorms of the mean square that
    leaves them in it; a head's or a neuron's is that of what it adds to the stream.

    Args:
        statistics: Of the teacher, by tower; of those that are cut at least.
        teacher: The teacher.
        student: The student's config.

    Returns:
        The operators by name, `(small, big)` or `(layers, small, big)`.
    """
    energies = {"vision": None, "text": None}
    for name, of_tower in statistics.items():
        tower = Tower(teacher, name)
        norms = [norm for layer in tower.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
        scales = torch.stack([norm.weight.double() for norm in (*norms, tower.final_norm)])
        channels = (scales.square() * of_tower.read.diagonal(dim1=1, dim2=2)).sum(dim=0)
        energies[name] = TowerScores(channels, of_tower.head_energy, of_tower.neuron_energy, of_tower.changed)
    embed = sum(of_tower.embeds.diagonal() for of_tower in statistics.values())
    return keep(Scores(**energies, embed=embed), teacher.config, student)
