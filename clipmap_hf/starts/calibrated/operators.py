"""Width operators of the calibrated start: principal axes, the strongest heads and neurons, lifts for the others."""

from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.axes import residual_axes
from clipmap_hf.starts.calibrated.heads import by_head, narrow_scores, value_axes
from clipmap_hf.starts.calibrated.moments import Moments, with_constant
from clipmap_hf.starts.calibrated.statistics import TowerStatistics
from clipmap_hf.starts.selection.scores import selection, strongest


__all__ = ["calibrated_operators", "embedding_axes", "lift"]

_RIDGE = 1e-3


def calibrated_operators(
    statistics: Mapping[str, TowerStatistics], teacher: PreTrainedModel, student: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """
    Width operators from what a folded teacher's activations are like.

    * The residual stream is mapped to its principal axes within the streams of mean zero, so that LayerNorm commutes
      with it up to a scalar for each token (`residual_axes`).
    * The vision tower's embeddings are mapped by `F diag(scale of pre_layrnorm)`, centered.
    * Heads and neurons are selected, by the energy of what they add to the stream. Of heads that are wider than the
      student's, those combinations of channels are kept that say most (`narrow_scores`, `narrow_values`).
    * The operators with which `out_proj` and `fc2` read them are lifts, the least-squares guess of all from those that
      are kept. Where calibration has no covariances of neurons, `fc2` reads the kept ones alone.
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
        neurons = strongest(found.neuron_energy, size.intermediate_size)  # (layers, intermediate_size)
        operators[f"{name}_residual"] = residual
        if name == "vision":
            embedding = residual * tower.model.pre_layrnorm.weight
            operators["vision_patch"] = embedding - embedding.mean(dim=1, keepdim=True)
        operators |= {f"{name}_{space}": operator for space, operator in _heads(tower, found, size, residual).items()}
        operators[f"{name}_value_in"] = _head_lifts(found.attended, operators[f"{name}_value"])
        operators[f"{name}_ffn"] = selection(neurons, tower.config.intermediate_size)
        alone = found.activated[0].diagonal
        operators[f"{name}_ffn_in"] = operators[f"{name}_ffn"] if alone else _lifts(found.activated, neurons)
    if student.projection_dim < teacher.config.projection_dim:
        operators["embed"] = embedding_axes([found.embeds for found in statistics.values()], student.projection_dim)
    return operators


def embedding_axes(moments: Iterable[torch.Tensor], size: int) -> torch.Tensor:
    """
    The operator of a smaller joint embedding, onto its principal axes, `(size, projection_dim)`.

    Args:
        moments: Second moments of the normalized embeddings, of each tower.
        size: Of the student's.
    """
    return torch.linalg.eigh(sum(moments)).eigenvectors.flip(1)[:, :size].T.float()


def _heads(
    tower: Tower, found: TowerStatistics, size: PretrainedConfig, residual: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The operators of queries, keys and values, `(layers, small, big)`."""
    width, operators = size.hidden_size // size.num_attention_heads, {"query": [], "key": [], "value": []}
    for index, layer in enumerate(tower.layers):
        attention, count = layer.self_attn, tower.config.num_attention_heads
        seen = with_constant(found.read[2 * index], found.means[2 * index])
        query, key = (
            by_head(torch.cat([linear.weight, linear.bias[:, None]], dim=1).double(), count)
            for linear in (attention.q_proj, attention.k_proj)
        )
        axes = narrow_scores(query @ seen @ query.mT, key @ seen @ key.mT, width)
        axes += (value_axes(attention, found.attended[index].covariance, residual, width),)
        heads = strongest(found.head_energy[index], size.num_attention_heads)
        places = F.one_hot(heads, count).double()
        for made, of_heads in zip(operators.values(), axes, strict=True):
            blocks = torch.einsum("kh,krc->krhc", places, of_heads[heads])  # each reads its own head's channels alone
            blocks = blocks.flatten(2).flatten(0, 1).float()
            made.append(F.pad(blocks, (0, 0, 0, size.hidden_size - len(blocks))))  # of heads that other layers have
    return {space: torch.stack(made) for space, made in operators.items()}


def _head_lifts(moments: list[Moments], operators: torch.Tensor) -> torch.Tensor:
    """For each layer the transposed least-squares map from what an operator keeps to all, `(layers, small, big)`."""
    lifts = []
    for inputs, operator in zip(moments, operators.double(), strict=True):
        rows = operator @ inputs.covariance  # (small, big)
        lifts.append(lift(rows, rows @ operator.T))
    return torch.stack(lifts)


def _lifts(moments: list[Moments], kept: torch.Tensor) -> torch.Tensor:
    """For each layer the transposed least-squares map from the kept entries to all, `(layers, small, big)`."""
    rows = [inputs.covariance[indices] for inputs, indices in zip(moments, kept, strict=True)]
    return torch.stack([lift(one, one[:, indices]) for one, indices in zip(rows, kept, strict=True)])


def lift(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """
    The transposed least-squares map from what is kept to all, `(small, big)`.

    Args:
        rows: Covariance of what is kept with all, `(small, big)`.
        among: Covariance of what is kept, `(small, small)`.
    """
    damping = _RIDGE * among.diagonal().mean() * torch.eye(len(among), dtype=among.dtype, device=among.device)
    return torch.linalg.solve(among + damping, rows).float()
