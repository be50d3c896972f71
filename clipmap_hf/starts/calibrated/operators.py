"""Width operators of the calibrated start: principal axes, the strongest heads and neurons, lifts for the others."""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.axes import residual_axes
from clipmap_hf.starts.calibrated.moments import Moments
from clipmap_hf.starts.calibrated.statistics import TowerStatistics
from clipmap_hf.starts.selection.scores import head_channels, selection, strongest


__all__ = ["calibrated_operators"]

_RIDGE = 1e-3


def calibrated_operators(
    statistics: Mapping[str, TowerStatistics], teacher: PreTrainedModel, student: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """
    Width operators from what a folded teacher's activations are like.

    * The residual stream is mapped to its principal axes within the streams of mean zero, so that LayerNorm commutes
      with it up to a scalar for each token (`residual_axes`).
    * The vision tower's embeddings are mapped by `F diag(scale of pre_layrnorm)`, centered.
    * Queries, keys, values and neurons are selected, by the energy of what they add to the stream; the operators with
      which `out_proj` and `fc2` read them are lifts, the least-squares guess of all from those that are kept. Where
      calibration has no covariances of neurons, `fc2` reads the kept ones alone.
    * A smaller joint embedding is mapped to its principal axes.

    Args:
        statistics: Of the folded teacher, by tower.
        teacher: The folded teacher.
        student: The student's config.

    Returns:
        The operators by name, `(small, big)` or `(layers, small, big)`.
    """
    operators = {}
    for name, found in statistics.items():
        tower, size = Tower(teacher, name), getattr(student, f"{name}_config")
        residual = residual_axes(found.read, size.hidden_size)
        heads = strongest(found.head_energy, size.num_attention_heads)
        heads = head_channels(heads, size.hidden_size // size.num_attention_heads)  # (layers, hidden_size)
        neurons = strongest(found.neuron_energy, size.intermediate_size)  # (layers, intermediate_size)
        operators[f"{name}_residual"] = residual
        if name == "vision":
            embedding = residual * tower.model.pre_layrnorm.weight
            operators["vision_patch"] = embedding - embedding.mean(dim=1, keepdim=True)
        for space in ("query", "key", "value"):
            operators[f"{name}_{space}"] = selection(heads, tower.config.hidden_size)
        operators[f"{name}_value_in"] = _lifts(found.attended, heads)
        operators[f"{name}_ffn"] = selection(neurons, tower.config.intermediate_size)
        alone = found.activated[0].diagonal
        operators[f"{name}_ffn_in"] = operators[f"{name}_ffn"] if alone else _lifts(found.activated, neurons)
    if student.projection_dim < teacher.config.projection_dim:
        moment = sum(found.embeds for found in statistics.values())
        operators["embed"] = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : student.projection_dim].T.float()
    return operators


def _lifts(moments: list[Moments], kept: torch.Tensor) -> torch.Tensor:
    """For each layer the transposed least-squares map from the kept entries to all, `(layers, small, big)`."""
    lifts = []
    for inputs, indices in zip(moments, kept, strict=True):
        rows = inputs.covariance[indices]  # (small, big)
        among = rows[:, indices]
        damping = _RIDGE * among.diagonal().mean() * torch.eye(len(among), dtype=among.dtype, device=among.device)
        lifts.append(torch.linalg.solve(among + damping, rows).float())
    return torch.stack(lifts)
