"""Calibrated start: principal axes of the teacher's stream, its strongest heads and neurons, lifts for the others."""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.mapping.calibration import TowerStatistics
from clipmap_hf.mapping.moments import Moments
from clipmap_hf.mapping.scores import head_channels, selection, strongest
from clipmap_hf.mapping.towers import Tower


__all__ = ["calibrated", "gains_and_shifts", "residual_axes", "set_pre_layrnorm", "stream_moment"]

_FINAL_WEIGHT = 4.0  # of the final LayerNorm among all: what it loses, no later layer makes good
_RIDGE = 1e-3


def calibrated(
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
    for name, of_tower in statistics.items():
        tower, size = Tower(teacher, name), getattr(student, f"{name}_config")
        residual = residual_axes(of_tower.read, size.hidden_size)
        heads = strongest(of_tower.head_energy, size.num_attention_heads)
        heads = head_channels(heads, size.hidden_size // size.num_attention_heads)  # (layers, hidden_size)
        neurons = strongest(of_tower.neuron_energy, size.intermediate_size)  # (layers, intermediate_size)
        operators[f"{name}_residual"] = residual
        if name == "vision":
            embedding = residual * tower.model.pre_layrnorm.weight
            operators["vision_patch"] = embedding - embedding.mean(dim=1, keepdim=True)
        for space in ("query", "key", "value"):
            operators[f"{name}_{space}"] = selection(heads, tower.config.hidden_size)
        operators[f"{name}_value_in"] = _lifts(of_tower.attended, heads)
        operators[f"{name}_ffn"] = selection(neurons, tower.config.intermediate_size)
        alone = of_tower.activated[0].diagonal
        operators[f"{name}_ffn_in"] = operators[f"{name}_ffn"] if alone else _lifts(of_tower.activated, neurons)
    if student.projection_dim < teacher.config.projection_dim:
        moment = sum(of_tower.embeds for of_tower in statistics.values())
        operators["embed"] = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : student.projection_dim].T.float()
    return operators


def residual_axes(read: torch.Tensor, size: int) -> torch.Tensor:
    """
    The operator `F = B Vᵀ (size, width)`: `V` are the main axes of the stream within the vectors of mean zero, `B` is
    an orthonormal basis of those of the student. Its rows and columns sum to zero, so `LN(F x)` is `F LN(x)` but for a
    scalar.

    Args:
        read: Second moments of the LayerNorms' outputs, `(norms, width, width)`, the final one last.
        size: Of the student.
    """
    width = read.shape[-1]
    if size == width:
        return _centering(read).float()
    axes = torch.linalg.eigh(stream_moment(read)).eigenvectors.flip(1)[:, : size - 1]
    spanning = torch.eye(size, dtype=read.dtype, device=read.device).roll(1, dims=1)
    spanning[:, 0] = 1
    basis = torch.linalg.qr(spanning).Q[:, 1:]  # orthonormal, and orthogonal to the vector of ones
    return (basis @ axes.T).float()


def stream_moment(read: torch.Tensor) -> torch.Tensor:
    """
    The second moment `(width, width)` of a tower's stream within the vectors of mean zero: the mean over its
    LayerNorms, up to a factor, the final one weighing more.

    Args:
        read: As in `residual_axes`.
    """
    share = read / read.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    total = share[:-1].sum(dim=0) + _FINAL_WEIGHT * share[-1]
    return _centering(read) @ total @ _centering(read)


def _centering(read: torch.Tensor) -> torch.Tensor:
    width = read.shape[-1]
    return torch.eye(width, dtype=read.dtype, device=read.device) - 1 / width


@torch.no_grad()
def gains_and_shifts(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: Mapping[str, TowerStatistics],
    operators: Mapping[str, torch.Tensor],
    layers: Mapping[str, list[int]],
) -> None:
    """
    Sets the LayerNorms that a mapped student's layers read through, whose inputs have lost length with their axes, and
    the biases that make up for the means of heads and neurons it has lost; and the constant part of its embeddings.

    Args:
        student: Mapped by `operators`; changed in place.
        teacher: The folded teacher.
        statistics: Of it, by tower.
        operators: As `calibrated` gives them.
        layers: The teacher's layers that the student's stand for, by tower.
    """
    for name, of_tower in statistics.items():
        big, small, residual = Tower(teacher, name), Tower(student, name), operators[f"{name}_residual"]
        gains = [_gain(residual, moment) for moment in of_tower.read]
        for index, layer in zip(layers[name], small.layers, strict=True):
            source = big.layers[index]
            layer.layer_norm1.weight.fill_(gains[2 * index])
            layer.layer_norm2.weight.fill_(gains[2 * index + 1])
            for space, own, writer, moments in (
                ("value", layer.self_attn.out_proj, source.self_attn.out_proj, of_tower.attended[index]),
                ("ffn", layer.mlp.fc2, source.mlp.fc2, of_tower.activated[index]),
            ):
                kept, lift = (operators[f"{name}_{one}"][index] for one in (space, f"{space}_in"))
                lost = moments.mean.float() - lift.T @ (kept @ moments.mean.float())
                own.bias += residual @ (writer.weight @ lost)
        small.final_norm.weight.fill_(gains[-1])
        constant = big.projection(big.final_norm.bias)
        small.add_constant(operators["embed"] @ constant if "embed" in operators else constant)


@torch.no_grad()
def set_pre_layrnorm(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: TowerStatistics,
    operators: Mapping[str, torch.Tensor],
) -> None:
    """
    Lets a mapped student's `pre_layrnorm` write the teacher's stream, mapped.

    Args:
        student: Mapped by `operators`; changed in place.
        teacher: The folded teacher.
        statistics: Of its vision tower.
        operators: As `calibrated` gives them.
    """
    norm, embedding = student.vision_model.pre_layrnorm, operators["vision_patch"].double()
    written = torch.einsum("sb,bc,sc->", embedding, statistics.embedded, embedding)
    centered = statistics.embedded.trace() - statistics.embedded.mean(dim=0).sum()
    norm.weight.fill_(float((embedding.shape[1] / embedding.shape[0] * written / centered).sqrt()))
    norm.bias.copy_(operators["vision_residual"] @ teacher.vision_model.pre_layrnorm.bias)


def _gain(residual: torch.Tensor, moment: torch.Tensor) -> float:
    """Length of a mapped LayerNorm output to that of the mapped stream's own."""
    residual = residual.double()
    return float((torch.einsum("sb,bc,sc->", residual, moment, residual) / len(residual)).sqrt())


def _lifts(moments: list[Moments], kept: torch.Tensor) -> torch.Tensor:
    """For each layer the transposed least-squares map from the kept entries to all, `(layers, small, big)`."""
    lifts = []
    for one, indices in zip(moments, kept, strict=True):
        rows = one.covariance[indices]  # (small, big)
        among = rows[:, indices]
        damping = _RIDGE * among.diagonal().mean() * torch.eye(len(among), dtype=among.dtype, device=among.device)
        lifts.append(torch.linalg.solve(among + damping, rows).float())
    return torch.stack(lifts)
